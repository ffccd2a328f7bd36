import pytest
import torch
from torch.utils.data import DataLoader

from consistency.data.datasets import ImageArray, digits


def test_items_and_batches():
    images = torch.arange(5 * 3 * 2 * 2, dtype=torch.uint8).view(5, 3, 2, 2)
    data = ImageArray(images, torch.arange(5) * 10)
    assert len(data) == 5
    image, label = data[3]
    assert torch.equal(image, images[3])
    assert int(label) == 30
    batch, labels = data.__getitems__([4, 0, 4])
    assert torch.equal(batch, images[[4, 0, 4]])
    assert labels.tolist() == [40, 0, 40]


def test_pytorch_reads_a_batch_in_one_call():
    data = ImageArray(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4))
    loader = DataLoader(data, batch_sampler=[[2, 1]], collate_fn=lambda batch: batch)
    ((images, labels),) = loader
    assert images.shape == (2, 1, 2, 2)
    assert labels.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2), "uint8"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2), r"\[2, 4, 4\]"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3), "2 images and 3 labels"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, 1), "labels"),
        (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), torch.zeros(0), "at least one"),
    ],
)
def test_refuses(images, labels, words):
    with pytest.raises(ValueError, match=words):
        ImageArray(images, labels)


def test_digits():
    data = digits()
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == torch.uint8
    # 17 grey levels over the whole range.
    assert data.images.unique().tolist() == [round(level * 255 / 16) for level in range(17)]
    assert data.labels.dtype == torch.int64
    assert data.labels.unique().tolist() == list(range(10))


def test_digits_limit():
    few = digits(limit=7)
    assert len(few) == len(few.labels) == 7
    assert torch.equal(few.images, digits().images[:7])
