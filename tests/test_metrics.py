import math

import pytest
import torch

from tl_entity.metrics import log_probability, relative_probability_change


def test_log_probability_by_hand() -> None:
    # Weights 1, 3 and 4 of 8.
    logits = torch.tensor([[0.0, math.log(3), math.log(4)]] * 2, dtype=torch.float64)
    scores = log_probability(logits, torch.tensor([1, 2]))
    torch.testing.assert_close(scores.exp(), torch.tensor([3 / 8, 4 / 8], dtype=torch.float64))


def test_every_sender_has_its_own_logits() -> None:
    logits = torch.randn(2, 4, 3, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([6, 0, 2])
    scores = log_probability(logits, targets)
    for row, target in enumerate(targets):
        expected = logits[:, :, row].softmax(-1)[..., target].log()
        torch.testing.assert_close(scores[:, :, row], expected)


def test_large_and_short_logits_do_not_overflow_or_round_away() -> None:
    scores = log_probability(torch.tensor([[9000.0, 9000.0]]), torch.tensor([0]))
    assert scores.item() == pytest.approx(-math.log(2), abs=1e-3)
    short = torch.tensor([[0.5, 20.0]], dtype=torch.bfloat16)
    score = log_probability(short, torch.tensor([0]))
    assert score.dtype == torch.float32
    assert score.item() == pytest.approx(-19.5, abs=1e-6)


def test_relative_change_by_hand() -> None:
    clean = torch.tensor([0.5, 0.2], dtype=torch.float64).log()
    patched = torch.tensor([[0.25, 0.2], [1.0, 0.0]], dtype=torch.float64).log()
    expected = torch.tensor([[-0.5, 0.0], [1.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(relative_probability_change(patched, clean), expected)


def test_relative_change_of_a_probability_too_small_to_write_down() -> None:
    clean = torch.tensor([-2000.0], dtype=torch.float64)
    patched = clean + math.log(3)
    torch.testing.assert_close(
        relative_probability_change(patched, clean), torch.tensor([2.0], dtype=torch.float64)
    )
