// A drawing board of the model's own pixels: an image below, a drawing above. Its value is JSON of both as PNGs.
const [canvas, size, colour, erase] = ["canvas", ".size", ".colour", ".erase"].map((name) => element.querySelector(name));
const view = canvas.getContext("2d");
const paper = () => Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
const drawing = paper(), marks = drawing.getContext("2d");
let image = null, sent = null, last = null;

function show() {
  view.globalAlpha = 1;
  view.fillStyle = "black";
  view.fillRect(0, 0, canvas.width, canvas.height);
  if (image) view.drawImage(image, 0, 0);
  view.globalAlpha = canvas.dataset.mode === "mask" ? 0.7 : 1;
  view.drawImage(drawing, 0, 0);
}

function send() {
  const drawn = marks.getImageData(0, 0, canvas.width, canvas.height).data.some((byte) => byte > 0);
  sent = JSON.stringify({ image: image ? image.src : null, drawing: drawn ? drawing.toDataURL() : null });
  props.value = sent;
}

function receive() {
  if (!props.value || props.value === sent) return;
  sent = props.value;
  const url = JSON.parse(sent).image;
  marks.clearRect(0, 0, canvas.width, canvas.height);
  image = null;
  show();
  if (!url) return;
  const picture = new Image();
  picture.onload = () => { image = picture; show(); };
  picture.src = url;
}

function dab(x, y) {
  const width = Number(size.value), corner = (place) => Math.round(place - width / 2);
  if (erase.checked) return marks.clearRect(corner(x), corner(y), width, width);
  marks.fillStyle = colour ? colour.value : "#ff3b30";
  marks.fillRect(corner(x), corner(y), width, width);  // whole pixels: nothing is smoothed
}

function stroke(event) {
  const box = canvas.getBoundingClientRect();
  const x = (event.clientX - box.left) * canvas.width / box.width, y = (event.clientY - box.top) * canvas.height / box.height;
  const from = last || { x, y }, dabs = Math.ceil(Math.max(Math.abs(x - from.x), Math.abs(y - from.y)) * 2) || 1;
  for (let i = 1; i <= dabs; i++) dab(from.x + (x - from.x) * i / dabs, from.y + (y - from.y) * i / dabs);
  last = { x, y };
  show();
}

if (canvas.dataset.mode !== "view") {
  canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); last = null; stroke(event); });
  canvas.addEventListener("pointermove", (event) => { if (event.buttons & 1) stroke(event); });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; send(); });
  element.querySelector(".clear").addEventListener("click", () => {
    marks.clearRect(0, 0, canvas.width, canvas.height);
    show();
    send();
  });
}
watch("value", receive);
show();
receive();
