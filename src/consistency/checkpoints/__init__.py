"""Models on disk: safetensors and plain JSON. Nothing in a file is ever executed."""
