"""Which tokens are chosen, counted here in plain Python."""

from __future__ import annotations

import itertools

import pytest
import torch

from inlay.core.container import Call
from inlay.core.errors import AdapterError, OptionError, SiteError
from inlay.core.positions import Positions, marked_prompts, real_tokens, spread

CPU = torch.device("cpu")


def chosen(real: list[int], prompt: int | None, first: int, last: int) -> list[int]:
    """Indices along the padded sequence, from a row's mask."""
    places = [i for i, r in enumerate(real) if r][:prompt]
    half = len(places) // 2
    return places[: min(first, half)] + places[len(places) - min(last, half) :]


@pytest.mark.parametrize(("first", "last"), [(7, 7), (2, 3), (1, 0), (0, 3), (0, 1)])
def test_against_plain_python(first, last):
    text = "+".join(f"{c}{n}" for c, n in (("f", first), ("l", last)) if n)
    positions = Positions.read(text)
    assert positions == Positions(first, last)
    generator = torch.Generator().manual_seed(0)
    length = 12
    masks = [[i < n for i in range(length)] for n in range(1, length + 1)]  # padded on the right
    masks += [row[::-1] for row in masks]  # on the left
    masks += (torch.rand(20, length, generator=generator) < 0.6).tolist()  # anywhere
    masks = [row for row in masks if sum(row)]
    mask = torch.tensor(masks)
    whole = [sum(row) for row in masks]
    for prompt in (None, [max(1, n // 2) for n in whole], [n + 3 for n in whole]):
        call = Call(mask, 0, None if prompt is None else torch.tensor(prompt))
        where, valid = positions.of(call, len(masks), length, CPU)
        assert where.shape == valid.shape == (len(masks), first + last)
        assert where.min() >= 0
        assert where.max() < length
        for i, row in enumerate(masks):
            assert where[i][valid[i]].tolist() == chosen(row, prompt and prompt[i], first, last)
    where, valid = positions.of(Call(), 2, length, CPU)
    assert where[1][valid[1]].tolist() == chosen([1] * length, None, first, last)


def test_text():
    assert Positions.read("all") == Positions(everything=True)
    for text in ("", "7", "f", "f7l7", "f7+", "+l7", "l7+f7", "f0", "f0+l0", "last"):
        with pytest.raises(OptionError, match="write 'f7\\+l7', 'f1', 'l3' or 'all'"):
            Positions.read(text)


def test_masks_of_every_kind():
    flat = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert torch.equal(real_tokens(flat), flat.bool())
    square = flat.bool()[:, None, None] & torch.ones(3, 3, dtype=torch.bool).tril()
    additive = torch.zeros(2, 1, 3, 3).masked_fill(~square, torch.finfo(torch.float32).min)
    for mask in (square, additive, {"full_attention": square, "sliding_attention": square & False}):
        assert torch.equal(real_tokens(mask), flat.bool())
    assert real_tokens(None) is None
    assert real_tokens(torch.ones(2, 3, 4)) is None


def test_prompts_marked_by_labels():
    ids = torch.tensor([[5, 6, 7, 8, 0], [0, 5, 6, 7, 8], [5, 6, 7, 8, 9], [5, 6, 7, 8, 9], [5, 6, 7, 8, 9]])
    mask = ids != 0
    labels = torch.full_like(ids, -100)
    labels[0, 2:4] = ids[0, 2:4]  # an answer after two tokens
    labels[1, 2:] = ids[1, 2:]  # after one, padded on the left
    labels[2] = ids[2]  # plain text: no prompt apart from the rest
    labels[3, 1] = 4  # a class, a masked token: no answer
    assert marked_prompts(ids, labels, mask).tolist() == [2, 1, 5, 5, 5]
    assert marked_prompts(ids, labels, None).tolist() == [2, 2, 5, 5, 5]
    assert marked_prompts(ids, labels[:, 0], mask) is None  # one class per row
    assert marked_prompts(ids, labels[:, :3], mask) is None
    assert marked_prompts(ids, None, mask) is None
    assert marked_prompts(None, labels, mask) is None


def test_beams_are_consecutive_rows():
    assert spread(torch.tensor([3, 5]), 6).tolist() == [3, 3, 3, 5, 5, 5]
    with pytest.raises(AdapterError, match="2 prompt lengths were given for a batch of 3"):
        spread(torch.tensor([3, 5]), 3)


def test_a_mask_of_another_sequence_is_refused():
    for shape in itertools.product((2, 3), (4, 9)):
        if shape != (2, 9):
            with pytest.raises(SiteError, match="use positions='all'"):
                Positions(2, 2).of(Call(torch.ones(shape, dtype=torch.bool)), 2, 9, CPU)


def test_static_caches_have_more_keys_than_queries():
    mask = torch.zeros(2, 1, 3, 8, dtype=torch.bool)
    mask[0, 0, -1, 1:3] = mask[1, 0, -1, :3] = True
    assert real_tokens(mask).tolist() == [[False, True, True], [True, True, True]]
