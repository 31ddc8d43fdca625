"""kernels/embedding_kernels.py in Triton's interpreter, which runs the kernels on CPU tensors: checks as on a GPU.

TRITON_INTERPRET=1 python -m pytest tests/embedding_kernels_interpreted.py    # as tests/test_block_kernels.py does
"""

import pytest
import torch
from embedding_kernels_checks import (
    RUNS,
    Parts,
    check_embedding,
    check_gradients_in_other_layouts,
    check_more_ids_than_16_bits_hold,
    check_padding,
    check_runs,
)
from test_compiled_parts import CONFIG

from modeling import BertForPreTraining, use_kernels


@pytest.mark.parametrize(
    ("dtype", "shape", "hidden", "packed", "probability", "count"),
    [
        (torch.float32, (53,), 96, True, 0.1, 2),
        (torch.bfloat16, (3, 17), 96, False, 0.5, 2),
        (torch.float16, (3, 17), 64, False, 0.0, 1),
        (torch.bfloat16, (1,), 768, True, 0.1, 1),
        (torch.float16, (21,), 768, True, 0.1, 2),
    ],
    ids=str,
)
def test_embeddings_and_their_gradients(dtype, shape, hidden, packed, probability, count):
    check_embedding("cpu", dtype, shape, hidden, packed, probability, count)


@pytest.mark.parametrize("types", [1, 5])
def test_other_numbers_of_types(types):
    check_embedding("cpu", torch.float32, (37,), 32, types=types)


@pytest.mark.parametrize("lengths", RUNS.values(), ids=RUNS)
def test_sums_by_id_whatever_chunks_the_ids_lie_in(lengths):
    check_runs("cpu", lengths)


def test_an_id_without_gradient():
    check_padding("cpu")


def test_more_ids_than_16_bits_hold():
    check_more_ids_than_16_bits_hold("cpu")


def test_gradients_and_ids_in_other_layouts():
    check_gradients_in_other_layouts("cpu")


def test_what_no_kernel_would_notice_is_refused():
    parts = Parts("cpu", 32, positions=8)
    with pytest.raises(ValueError, match="sequences of 9 tokens: there are 8 positions"):
        parts.run(parts.ids((2, 9), packed=False), 0.0, torch.float32)
    parts.tables[0].bfloat16()
    with pytest.raises(ValueError, match="must be fp32"):
        parts.run(parts.ids((2, 8), packed=False), 0.0, torch.float32)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_in_a_model_they_are_the_plain_embeddings_also_padded(checkpointed):
    """In fp32, which hides nothing: losses' gradients with and without; in evaluation, too."""
    torch.manual_seed(0)
    model = BertForPreTraining(CONFIG)
    ids = torch.randint(1, CONFIG.vocab_size, (3, 11))
    model.bert.encoder.checkpoint_activations = checkpointed

    def results() -> list[torch.Tensor]:
        scores = model(ids, ids % 2, torch.ones_like(ids))
        loss = sum(part.square().mean() for part in scores)
        with torch.no_grad():
            evaluated = model.eval()(ids, ids % 2, None)[0]
        model.train()
        return [evaluated, *torch.autograd.grad(loss, list(model.parameters()))]

    expected = results()
    use_kernels(model)
    found = results()
    whole = torch.stack([gradient.norm() for gradient in expected[1:]]).norm()
    for ours, right in zip(found, expected, strict=True):
        assert (ours - right).norm() < 1e-5 * right.norm() + 1e-6 * whole
    assert not all(map(torch.equal, found, expected)), "the kernels did not run"
