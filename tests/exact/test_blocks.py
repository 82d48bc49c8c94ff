import pytest
import torch

from tests.random_models import random_model
from tl_entity.exact.blocks import log_normalizer, unembed


@pytest.mark.parametrize("d_vocab", [7, 2048, 5000])
@pytest.mark.parametrize("n_rows", [1, 1024, 1500])
def test_the_normalizer_of_any_vocabulary_and_number_of_rows(d_vocab: int, n_rows: int) -> None:
    """Smaller and larger than the blocks that it is computed by."""
    model = random_model(n_layers=1, d_vocab=d_vocab)
    model.unembed.b_U.data.normal_(generator=torch.Generator().manual_seed(1))
    resid = torch.randn(n_rows, 2, model.cfg.d_model, dtype=model.cfg.dtype)
    expected = unembed(model, resid).logsumexp(-1)
    torch.testing.assert_close(log_normalizer(model, resid), expected)


def test_the_normalizer_of_large_and_short_logits() -> None:
    """Logits of many thousands don't overflow, and bfloat16 is summed in float32."""
    model = random_model(n_layers=1, d_vocab=3000).to(torch.bfloat16)
    model.unembed.W_U.data *= 1000
    resid = torch.randn(3, model.cfg.d_model).to(torch.bfloat16)
    logits = unembed(model, resid).float()
    assert logits.abs().max() > 1000
    found = log_normalizer(model, resid)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits.logsumexp(-1))
