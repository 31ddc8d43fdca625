"""The useful work of a pretraining step, and what share of the chips' peak it is (MFU).

Work is counted as if the model were dense and nothing were padded: sparsity, recomputed activations and padding change
the time of a step, not its work, so runs of one model are compared by the same measure. What no loss reads is no work:
behind the last block's attention, the tokens that are neither predicted nor the first of a sequence.
"""

from configuration import BertConfig

FORWARD_AND_BACKWARD = 3  # a product's two gradients cost as much again, each
# Dense TFLOP/s by the vendors' datasheets, in 16 bits and in fp32; the first name that the device's contains.
PEAK_TFLOPS = {
    "H200": (989.4, 66.9),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.4, 66.9),
    "A100": (312.0, 19.5),
}


def useful_flops(
    config: BertConfig, tokens: float, squared_lengths: float, masked_tokens: float, sequences: float
) -> float:
    """FLOPs of one optimizer step: matrix products, forward and backward, a multiplication and an addition as two.

    Args:
        tokens: of all sequences, without padding.
        squared_lengths: sum of the sequences' squared lengths, which attention's products grow with.
        masked_tokens: positions whose token the head predicts.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    attention_weights, other_weights = 3 * hidden**2, hidden**2 + 2 * hidden * config.intermediate_size
    last_tokens = masked_tokens + (sequences if config.next_sentence else 0)
    head_weights = hidden**2 + hidden * config.padded_vocab_size
    sentence_weights = hidden**2 + 2 * hidden if config.next_sentence else 0
    multiplications = (
        layers * (attention_weights * tokens + 2 * hidden * squared_lengths)
        + other_weights * ((layers - 1) * tokens + last_tokens)
        + head_weights * masked_tokens
        + sentence_weights * sequences
    )
    return 2 * FORWARD_AND_BACKWARD * multiplications


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Peak of one device in TFLOP/s for a `--precision`; None for a device that is not in the table."""
    for name, (half, full) in PEAK_TFLOPS.items():
        if name in device_name:
            return full if precision == "fp32" else half
    return None
