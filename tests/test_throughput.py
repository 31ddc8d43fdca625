"""The work of a step, counted by torch itself on a model, and its share of a chip's peak."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configuration import BertConfig
from modeling import BertForPreTraining, pretraining_loss_sums
from training.throughput import peak_tflops, useful_flops

SEQUENCES, LENGTH, MASKED = 3, 16, 5


@pytest.mark.parametrize("next_sentence", [True, False])
def test_the_work_is_what_torch_counts_on_a_dense_model(next_sentence):
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        next_sentence=next_sentence,
    )
    model = BertForPreTraining(config).train()
    ids = torch.randint(100, (SEQUENCES, LENGTH))
    positions = torch.arange(MASKED).expand(SEQUENCES, MASKED)
    labels, sentence_labels = torch.ones(SEQUENCES, MASKED, dtype=torch.long), torch.ones(SEQUENCES, dtype=torch.long)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        scores, sentence_scores = model(ids, torch.zeros_like(ids), None, positions)
        sum(pretraining_loss_sums(scores, sentence_scores, labels, sentence_labels)).backward()
    tokens = SEQUENCES * LENGTH
    expected = useful_flops(config, tokens, SEQUENCES * LENGTH**2, SEQUENCES * MASKED, SEQUENCES)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.002)


def test_peaks_are_of_the_device_and_the_precision():
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == peak_tflops("NVIDIA H200", "fp16") == 989.4
    assert peak_tflops("NVIDIA H100 PCIe", "bf16") == 756.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5
    assert peak_tflops("NVIDIA GeForce RTX 4090", "bf16") is None
