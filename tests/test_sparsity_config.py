"""`SparsityConfig`, the grammar of `--sparsity_increment`, and what flags may say about a checkpoint."""

import argparse
import dataclasses
import io

import pytest
import torch

from training.errors import UsageError
from training.sparsity import (
    KINDS,
    SparsityConfig,
    add_sparsity_flags,
    check_adapter_flags,
    parse_sparsity_increment,
    pattern_of_blocks,
    sparsity_from_flags,
)

SLOPE = SparsityConfig(pruned_matrix="static-weight")


# ------------------------------------------------------------------------------------------------- SparsityConfig
def test_config_is_frozen_and_prunes_nothing_by_default():
    config = SparsityConfig()
    assert config.pruned_matrix == "none" and not config.sparse and SLOPE.sparse
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lora_rank = 4


@pytest.mark.parametrize(
    ("spelling", "kind"),
    [
        ("weight-static", "static-weight"),
        ("weight-dynamic", "dynamic-weight"),
        ("input-static", "static-input"),
        ("input-dynamic", "dynamic-input"),
        ("output-grad-dynamic", "dynamic-output-grad"),
        *[(kind, kind) for kind in KINDS],
    ],
)
def test_reversed_spellings_mean_the_same(spelling, kind):
    assert SparsityConfig(pruned_matrix=spelling) == SparsityConfig(pruned_matrix=kind)
    assert SparsityConfig(pruned_matrix=spelling).to_dict()["pruned_matrix"] == kind


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        ({"pruned_matrix": "static-wight"}, "--pruned_matrix static-wight.*static-weight"),
        ({"pruned_matrix": ""}, "--pruned_matrix"),
        ({"pruned_matrix": "dynamic-input", "unstructured_masking": True}, "--unstructured_masking.*static-weight"),
        ({"pruned_matrix": "dynamic-input", "double_prune": False}, "--double_prune False.*static-weight"),
        ({"unstructured_mask_sparsity": 100.0}, "--unstructured_mask_sparsity 100"),
        ({"unstructured_mask_sparsity": -1.0}, "--unstructured_mask_sparsity -1"),
        ({"unstructured_mask_sparsity": float("nan")}, "--unstructured_mask_sparsity nan"),
    ],
)
def test_wrong_values_are_refused_by_the_name_of_their_flag(wrong, flag):
    with pytest.raises(UsageError, match=flag) as error:
        SparsityConfig(**wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        SparsityConfig(),
        SparsityConfig("static-weight", False, True, True, True, True, 87.5, (0, 12, -1), 16, False),
        SparsityConfig("dynamic-input", sparsity_increment=[3]),
    ],
)
def test_description_survives_a_checkpoint(config):
    file = io.BytesIO()
    torch.save(config.to_dict(), file)
    file.seek(0)
    description = torch.load(file, weights_only=True)
    assert SparsityConfig.from_dict(description) == config
    with pytest.raises(UsageError, match="granularity"):
        SparsityConfig.from_dict(description | {"granularity": 4})


# ------------------------------------------------------------------------------------------- --sparsity_increment
@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("", [4] * 24),
        ("-1", [4] * 24),
        ("0,12,-1", [8] * 12 + [4] * 12),
        ("12", [4] * 12 + [8] * 12),
        ("0", [8] * 24),
        ("23", [4] * 23 + [8]),
        ("4,-1", [4] * 24),
        ("4,8,-1", [4] * 4 + [8] * 4 + [4] * 16),
        ("0,6,12,18", [8] * 6 + [16] * 6 + [32] * 6 + [64] * 6),
        ("6,12,18,-1", [4] * 6 + [8] * 6 + [16] * 6 + [4] * 6),
        (" 6, 12 ", [4] * 6 + [8] * 6 + [16] * 12),
    ],
)
def test_sparsity_increment_of_24_blocks(text, patterns):
    assert pattern_of_blocks(parse_sparsity_increment(text), 24) == patterns
    through_config = SparsityConfig("static-weight", sparsity_increment=parse_sparsity_increment(text))
    assert pattern_of_blocks(through_config.sparsity_increment, 24) == patterns


@pytest.mark.parametrize(
    "text", ["two", "1;2", "1,,2", ",", "1.5", "12,6", "6,6", "-2", "-1,6", "6,-1,12", "-1,-1", "1e1"]
)
def test_malformed_sparsity_increment(text):
    with pytest.raises(UsageError, match="--sparsity_increment") as error:
        parse_sparsity_increment(text)
    assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["24", "0,24", "12,24,-1", "1000"])
def test_sparsity_increment_beyond_the_last_block(text):
    with pytest.raises(UsageError, match=f"--sparsity_increment {text}.*24 blocks.*23"):
        pattern_of_blocks(parse_sparsity_increment(text), 24)


# ------------------------------------------------------------------------------------- flags beside a checkpoint
def flags(given=(), **values):
    """Parsed sparsity flags; the ones in `values` and `given` were on the command line."""
    parser = argparse.ArgumentParser()
    add_sparsity_flags(parser)
    args = parser.parse_args([])
    vars(args).update(values, given={*given, *values})
    return args


def test_flags_become_the_description():
    args = flags(pruned_matrix="weight-static", sparsity_increment="0,12,-1", reduction_dim=False, skip_attention=True)
    expected = SparsityConfig("static-weight", False, skip_attention=True, sparsity_increment=(0, 12, -1))
    assert sparsity_from_flags(args) == expected
    assert sparsity_from_flags(flags()) == SparsityConfig()


SAVED = SparsityConfig("static-weight", sparsity_increment=(12,), skip_last_block=True, lora_rank=4)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"pruned_matrix": "weight-static"},
        {"pruned_matrix": "static-weight", "skip_last_block": True, "sparsity_increment": "12"},
        {"pruned_matrix": "static-weight", "unstructured_mask_sparsity": 90.0},
    ],
    ids=str,
)
def test_the_checkpoint_decides_where_no_flag_contradicts_it(values):
    """Defaults say nothing, and neither does a percentage beside N:M masks."""
    assert sparsity_from_flags(flags(**values), SAVED) == SAVED


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pruned_matrix": "none"}, "--pruned_matrix none .* static-weight"),
        ({"pruned_matrix": "dynamic-weight"}, "--pruned_matrix dynamic-weight .* static-weight"),
        ({"pruned_matrix": "static-weight", "sparsity_increment": "-1"}, "--sparsity_increment -1 .* 12"),
        ({"pruned_matrix": "static-weight", "sparsity_increment": "0,12"}, "--sparsity_increment 0,12 .* 12"),
        ({"pruned_matrix": "static-weight", "reduction_dim": False}, "--reduction_dim False .* True"),
        ({"reduction_dim": False}, "--reduction_dim False .* True"),
        ({"sparsity_increment": "-1"}, "--sparsity_increment -1 .* 12"),
        ({"unstructured_masking": True}, "--unstructured_masking True .* False"),
        ({"pruned_matrix": "static-weight", "double_prune": False}, "--double_prune False .* True"),
        ({"pruned_matrix": "static-weight", "skip_last_block": False}, "--skip_last_block False .* True"),
        ({"pruned_matrix": "static-weight", "unstructured_masking": True}, "--unstructured_masking True .* False"),
    ],
    ids=str,
)
def test_a_flag_that_contradicts_the_checkpoint(values, message):
    with pytest.raises(UsageError, match=message) as error:
        sparsity_from_flags(flags(**values), SAVED)
    assert "\n" not in str(error.value)


def test_a_percentage_contradicts_an_unstructured_checkpoint():
    saved = SparsityConfig("static-weight", unstructured_masking=True, unstructured_mask_sparsity=80)
    named = {"pruned_matrix": "static-weight", "unstructured_masking": True}
    for others in ({}, named):
        with pytest.raises(UsageError, match="--unstructured_mask_sparsity 90.* 80"):
            sparsity_from_flags(flags(unstructured_mask_sparsity=90.0, **others), saved)
    assert sparsity_from_flags(flags(reduction_dim=False, **named), saved) == saved, "without effect here"


def test_a_dense_checkpoint_that_must_stay_dense():
    dense = SparsityConfig()
    assert sparsity_from_flags(flags(reduction_dim=False, skip_attention=True), dense) == dense
    with pytest.raises(UsageError, match="--pruned_matrix static-weight .* none"):
        sparsity_from_flags(flags(pruned_matrix="static-weight"), dense)


def test_adapter_flags():
    check_adapter_flags(flags(add_lora="True"), SLOPE)
    check_adapter_flags(flags(), SAVED)
    check_adapter_flags(flags(add_lora="True", lora_rank=4), SAVED)
    for args, sparsity, message in (
        (flags(add_lora="True"), SparsityConfig(), "--add_lora True.*--pruned_matrix is none"),
        (flags(add_lora="False"), SAVED, "--add_lora False .* rank 4"),
        (flags(add_lora="True", lora_rank=8), SAVED, "--lora_rank 8 .* 4"),
    ):
        with pytest.raises(UsageError, match=message):
            check_adapter_flags(args, sparsity)
