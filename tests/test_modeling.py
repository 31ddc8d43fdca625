"""`modeling` against Hugging Face's BERT, an independent implementation, and against itself where that has no match."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers

from modeling import (
    PADDED_BIAS,
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    encoder_blocks,
    input_projections,
    pretraining_loss_sums,
)
from training.errors import UsageError
from training.hf_folders import ARCHITECTURE_KEYS

WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
TINY = BertConfig(
    vocab_size=61,  # padded to 64
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    max_position_embeddings=32,
    initializer_range=0.3,  # large, so that logits and gradients are far from 0
)
SHAPES = [(1, 1), (2, 7), (3, 32)]
# Rounding: these models' values are of order 1 and sums of a few hundred terms.
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 2e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-12}}


def hf_config(config, **extra):
    values = {key: value for key, value in config.to_dict().items() if key in ARCHITECTURE_KEYS}
    return transformers.BertConfig(**values, **extra)


def perturb(model):
    """Biases and LayerNorms away from 0 and 1, where an error in them could hide; [PAD]'s embedding too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def copy_unpadded(ours, theirs, vocab_size):
    """Our weights into Hugging Face's model, under the same names; only the vocabulary is cut."""
    names = {name for name, _ in theirs.named_parameters()}
    weights = dict(ours.named_parameters())
    assert set(weights) == names
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            is_vocabulary = name in (WORD_EMBEDDINGS, "cls.predictions.bias")
            parameter.copy_(weights[name][:vocab_size] if is_vocabulary else weights[name])


def pair(ours, hf_class, config, dtype=torch.float32, attention="sdpa", **hf_extra):
    theirs = hf_class(hf_config(config, attn_implementation=attention, **hf_extra)).to(dtype)
    ours = ours.to(dtype)
    perturb(ours)
    if hasattr(ours, "cls"):
        with torch.no_grad():
            ours.cls.predictions.bias[config.vocab_size :] = PADDED_BIAS
            ours.bert.embeddings.word_embeddings.weight[config.vocab_size :] = 0
    copy_unpadded(ours, theirs, config.vocab_size)
    return ours, theirs


def make_batch(config, batch_size, length, masked=5, seed=0):
    """Sequences of different real lengths, padding after them; labels at distinct positions, unused ones ignored."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, config.vocab_size, (batch_size, length), generator=generator)
    real = torch.randint(1, length + 1, (batch_size,), generator=generator)
    real[0] = length
    attention_mask = (torch.arange(length) < real[:, None]).long()
    input_ids = input_ids * attention_mask
    token_type_ids = (torch.arange(length) >= real[:, None] // 2).long() * attention_mask
    masked_positions = torch.zeros(batch_size, masked, dtype=torch.long)
    masked_labels = torch.full((batch_size, masked), -1)
    for row, count in enumerate(real.tolist()):
        positions = torch.randperm(count, generator=generator)[: min(masked - 1, count)].sort().values
        masked_positions[row, : len(positions)] = positions
        masked_labels[row, : len(positions)] = torch.randint(
            0, config.vocab_size, (len(positions),), generator=generator
        )
    next_sentence_labels = torch.randint(0, 2, (batch_size,), generator=generator)
    inputs = {"input_ids": input_ids, "token_type_ids": token_type_ids, "attention_mask": attention_mask}
    return inputs, masked_positions, masked_labels, next_sentence_labels


def full_labels(inputs, masked_positions, masked_labels, ignore_index):
    labels = torch.full_like(inputs["input_ids"], ignore_index)
    for row, (positions, values) in enumerate(zip(masked_positions, masked_labels, strict=True)):
        used = values != -1
        labels[row, positions[used]] = values[used]
    return labels


def block_outputs(blocks, run):
    """Hidden states after each block, in order, of one forward pass."""
    outputs = []
    handles = [
        block.register_forward_hook(
            lambda _module, _args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in blocks
    ]
    result = run()
    for handle in handles:
        handle.remove()
    return outputs, result


def assert_same_gradients(ours, theirs, vocab_size, **tolerance):
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        gradient = parameter.grad
        if gradient is None:
            assert expected[name] is None, name
            continue
        if gradient.shape != expected[name].shape:
            assert not gradient[vocab_size:].any(), f"{name}: padded entries have a gradient"
            gradient = gradient[:vocab_size]
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu"])
def test_pretraining_matches_hugging_face(shape, hidden_act, attention):
    """Same weights: the same hidden states, logits, loss and gradients to fp32 rounding."""
    torch.manual_seed(1)
    config = replace(TINY, hidden_act=hidden_act)
    ours, theirs = pair(BertForPreTraining(config), transformers.BertForPreTraining, config, attention=attention)
    inputs, masked_positions, masked_labels, next_sentence_labels = make_batch(config, *shape)

    hidden, (scores, sentence_scores) = block_outputs(
        [block for _, block in encoder_blocks(ours)], lambda: ours(**inputs, masked_positions=masked_positions)
    )
    expected = theirs(
        **inputs,
        labels=full_labels(inputs, masked_positions, masked_labels, -100),
        next_sentence_label=next_sentence_labels,
        output_hidden_states=True,
    )
    tolerance = TOLERANCE[torch.float32]
    read = torch.cat([masked_positions, torch.zeros(len(masked_positions), 1, dtype=torch.long)], 1)  # by the two heads
    *whole, last = expected.hidden_states[1:]
    last = last.gather(1, read.unsqueeze(-1).expand(-1, -1, config.hidden_size))
    expected_hidden = [*whole, torch.cat([last[:, :-1].flatten(0, 1), last[:, -1]])]
    for state, expected_state in zip(hidden, expected_hidden, strict=True):
        torch.testing.assert_close(state, expected_state, **tolerance)
    index = masked_positions.unsqueeze(-1).expand(-1, -1, config.vocab_size)
    torch.testing.assert_close(
        scores[..., : config.vocab_size], expected.prediction_logits.gather(1, index), **tolerance
    )
    torch.testing.assert_close(sentence_scores, expected.seq_relationship_logits, **tolerance)

    mlm_sum, nsp_sum = pretraining_loss_sums(scores, sentence_scores, masked_labels, next_sentence_labels)
    loss = mlm_sum / (masked_labels != -1).sum() + nsp_sum / len(next_sentence_labels)
    torch.testing.assert_close(loss, expected.loss, **tolerance)
    loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs, config.vocab_size, **tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_pretraining_matches_hugging_face_in_float64(shape):
    """The sharp bound: logits of every position and, for one random cotangent, every gradient."""
    torch.manual_seed(2)
    ours, theirs = pair(BertForPreTraining(TINY), transformers.BertForPreTraining, TINY, torch.float64, "eager")
    inputs, *_ = make_batch(TINY, *shape)
    scores, sentence_scores = ours(**inputs)
    expected = theirs(**inputs)
    tolerance = TOLERANCE[torch.float64]
    torch.testing.assert_close(scores[..., : TINY.vocab_size], expected.prediction_logits, **tolerance)
    torch.testing.assert_close(sentence_scores, expected.seq_relationship_logits, **tolerance)

    cotangent, sentence_cotangent = torch.randn_like(expected.prediction_logits), torch.randn_like(sentence_scores)
    for logits, sentence_logits in (
        (scores[..., : TINY.vocab_size], sentence_scores),
        (expected.prediction_logits, expected.seq_relationship_logits),
    ):
        ((logits * cotangent).sum() + (sentence_logits * sentence_cotangent).sum()).backward()
    assert_same_gradients(ours, theirs, TINY.vocab_size, **tolerance)


def test_without_padding_no_mask_is_the_mask_of_ones():
    torch.manual_seed(3)
    model = BertForPreTraining(TINY)
    input_ids, token_type_ids = torch.randint(1, 61, (2, 9)), torch.randint(0, 2, (2, 9))
    for out, expected in zip(
        model(input_ids, token_type_ids, None), model(input_ids, token_type_ids, torch.ones(2, 9)), strict=True
    ):
        torch.testing.assert_close(out, expected, **TOLERANCE[torch.float32])


def test_sequence_classification_matches_hugging_face():
    torch.manual_seed(4)
    ours, theirs = pair(
        BertForSequenceClassification(TINY, num_labels=3),
        transformers.BertForSequenceClassification,
        TINY,
        torch.float64,
        num_labels=3,
    )
    inputs, *_ = make_batch(TINY, 4, 16)
    labels = torch.tensor([0, 2, 1, 1])
    logits, expected = ours(**inputs), theirs(**inputs, labels=labels)
    torch.testing.assert_close(logits, expected.logits, **TOLERANCE[torch.float64])
    F.cross_entropy(logits, labels).backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs, TINY.vocab_size, **TOLERANCE[torch.float64])


def test_question_answering_matches_hugging_face():
    torch.manual_seed(5)
    ours, theirs = pair(
        BertForQuestionAnswering(TINY), transformers.BertForQuestionAnswering, TINY, torch.float64, "eager"
    )
    inputs, *_ = make_batch(TINY, 4, 16)
    starts, ends = torch.tensor([0, 3, 1, 2]), torch.tensor([0, 5, 1, 4])
    start_logits, end_logits = ours(**inputs)
    expected = theirs(**inputs, start_positions=starts, end_positions=ends)
    torch.testing.assert_close(start_logits, expected.start_logits, **TOLERANCE[torch.float64])
    torch.testing.assert_close(end_logits, expected.end_logits, **TOLERANCE[torch.float64])
    ((F.cross_entropy(start_logits, starts) + F.cross_entropy(end_logits, ends)) / 2).backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs, TINY.vocab_size, **TOLERANCE[torch.float64])


def test_dropout_is_where_hugging_face_has_it():
    """The same random stream on the same module order: equal outputs only if each dropout has its place and rate."""
    torch.manual_seed(6)
    config = replace(TINY, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.5)
    ours, theirs = pair(BertForPreTraining(config), transformers.BertForPreTraining, config)
    inputs, *_ = make_batch(config, 3, 16)
    results = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(7)
        results.append(model(**inputs))
    torch.testing.assert_close(
        results[0][0][..., : config.vocab_size], results[1].prediction_logits, **TOLERANCE[torch.float32]
    )
    for model in (ours.eval(), theirs.eval()):
        results.append(model(**inputs))
    torch.testing.assert_close(
        results[2][0][..., : config.vocab_size], results[3].prediction_logits, **TOLERANCE[torch.float32]
    )
    assert not torch.allclose(results[0][0], results[2][0])


def test_classifier_dropout_is_where_hugging_face_has_it():
    torch.manual_seed(6)
    config = replace(TINY, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.5)
    ours, theirs = pair(
        BertForSequenceClassification(config, 3), transformers.BertForSequenceClassification, config, num_labels=3
    )
    inputs, *_ = make_batch(config, 3, 16)
    torch.manual_seed(7)
    logits = ours.train()(**inputs)
    torch.manual_seed(7)
    torch.testing.assert_close(logits, theirs.train()(**inputs).logits, **TOLERANCE[torch.float32])


def test_gathered_positions_give_the_loss_of_all_positions():
    torch.manual_seed(8)
    model = BertForPreTraining(TINY)
    inputs, masked_positions, masked_labels, next_sentence_labels = make_batch(TINY, 4, 20)
    labels = full_labels(inputs, masked_positions, masked_labels, -1)
    sums, gradients = [], []
    for positions, positions_labels in ((masked_positions, masked_labels), (None, labels)):
        model.zero_grad()
        losses = pretraining_loss_sums(
            *model(**inputs, masked_positions=positions), positions_labels, next_sentence_labels
        )
        sum(losses).backward()
        sums.append(losses)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(sums[0], sums[1], **TOLERANCE[torch.float32])
    torch.testing.assert_close(gradients[0], gradients[1], **TOLERANCE[torch.float32])


def test_loss_sums_ignore_minus_one_and_are_fp32_for_half_precision_scores():
    scores = torch.randn(2, 3, 8).bfloat16()
    labels = torch.tensor([[1, -1, 7], [-1, -1, 0]])
    sentence_scores, sentence_labels = torch.randn(2, 2).bfloat16(), torch.tensor([-1, 1])
    mlm_sum, nsp_sum = pretraining_loss_sums(scores, sentence_scores, labels, sentence_labels)
    log_probs, sentence_log_probs = scores.double().log_softmax(-1), sentence_scores.double().log_softmax(-1)
    expected = -(log_probs[0, 0, 1] + log_probs[0, 2, 7] + log_probs[1, 2, 0])
    assert mlm_sum.dtype == nsp_sum.dtype == torch.float32
    assert mlm_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    assert nsp_sum.item() == pytest.approx(-sentence_log_probs[1, 1].item(), rel=1e-6)
    assert pretraining_loss_sums(scores, None, labels, sentence_labels)[1].item() == 0
    nothing = pretraining_loss_sums(scores, sentence_scores, torch.full_like(labels, -1), torch.full((2,), -1))
    assert [loss.item() for loss in nothing] == [0, 0]


def train_steps(model, steps, batch_size=4, length=16, **forward):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        inputs, masked_positions, masked_labels, next_sentence_labels = make_batch(TINY, batch_size, length, seed=step)
        outputs = model(**inputs, masked_positions=masked_positions)
        optimizer.zero_grad()
        sum(pretraining_loss_sums(*outputs, masked_labels, next_sentence_labels)).backward()
        optimizer.step()


def test_padded_vocabulary_stays_inert_while_training():
    torch.manual_seed(9)
    model = BertForPreTraining(TINY)
    word_embeddings, bias = model.bert.embeddings.word_embeddings.weight, model.cls.predictions.bias
    before = word_embeddings[: TINY.vocab_size].clone()
    train_steps(model, 5)
    assert word_embeddings.shape == (64, 24)
    assert not word_embeddings[TINY.vocab_size :].any()
    assert (bias[TINY.vocab_size :] == PADDED_BIAS).all()
    assert not torch.equal(word_embeddings[: TINY.vocab_size], before)
    inputs, *_ = make_batch(TINY, 2, 8)
    assert not model(**inputs)[0].softmax(-1)[..., TINY.vocab_size :].any()


def test_checkpointed_activations_give_the_same_gradients_with_dropout():
    torch.manual_seed(10)
    model = BertForPreTraining(replace(TINY, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2))
    inputs, masked_positions, masked_labels, next_sentence_labels = make_batch(TINY, 3, 16)
    runs = {}
    for checkpointed in (False, True):
        model.zero_grad()
        model.bert.encoder.checkpoint_activations = checkpointed
        calls = []
        handle = encoder_blocks(model)[0][1].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(11)
        outputs = model(**inputs, masked_positions=masked_positions)
        sum(pretraining_loss_sums(*outputs, masked_labels, next_sentence_labels)).backward()
        handle.remove()
        runs[checkpointed] = outputs[0], [parameter.grad.clone() for parameter in model.parameters()], len(calls)
    torch.testing.assert_close(runs[True][:2], runs[False][:2], rtol=0, atol=0)
    assert (runs[False][2], runs[True][2]) == (1, 2)  # the blocks did run again in the backward pass


@pytest.mark.parametrize("checkpointed", [False, True])
def test_forward_and_loss_compile_into_one_graph(checkpointed):
    torch.manual_seed(12)
    model = BertForPreTraining(TINY)
    model.bert.encoder.checkpoint_activations = checkpointed
    inputs, masked_positions, masked_labels, next_sentence_labels = make_batch(TINY, 3, 16)

    def losses():
        scores = model(**inputs, masked_positions=masked_positions)
        return pretraining_loss_sums(*scores, masked_labels, next_sentence_labels)

    torch.testing.assert_close(torch.compile(losses, backend="aot_eager", fullgraph=True)(), losses())


def test_state_dict_names_are_hugging_faces():
    ours, theirs = BertForPreTraining(TINY), transformers.BertForPreTraining(hf_config(TINY))
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert ours.cls.predictions.decoder.weight is ours.bert.embeddings.word_embeddings.weight
    assert not any(tensor.is_meta for tensor in ours.state_dict().values())


def test_initial_weights():
    torch.manual_seed(13)
    config = replace(TINY, hidden_size=96, intermediate_size=192, initializer_range=0.02)
    model = BertForPreTraining(config)
    for name, parameter in model.named_parameters():
        if name == WORD_EMBEDDINGS:
            assert not parameter[0].any()
            assert not parameter[config.vocab_size :].any()
            parameter = parameter[1 : config.vocab_size]
        if name == "cls.predictions.bias":
            parameter = parameter[: config.vocab_size]
        if name.endswith("LayerNorm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            # Four standard errors of a sample standard deviation and mean.
            error = 0.02 * 4 / parameter.numel() ** 0.5
            assert abs(parameter.std().item() - 0.02) < error, name
            assert abs(parameter.mean().item()) < error, name


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("next_sentence", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_behind_its_attention_the_last_block_computes_what_is_read(next_sentence, whole, checkpointed):
    model = BertForPreTraining(replace(TINY, next_sentence=next_sentence))
    model.bert.encoder.whole_last_block, model.bert.encoder.checkpoint_activations = whole, checkpointed
    inputs, masked_positions, _, _ = make_batch(TINY, 3, 16)
    tokens = []
    for _, block in encoder_blocks(model)[-2:]:
        for layer in (block.attention.output.dense, block.intermediate.dense, block.output.dense):
            layer.register_forward_hook(lambda _layer, _given, out: tokens.append(out.numel() // out.shape[-1]))
    model(**inputs, masked_positions=masked_positions)
    read = masked_positions.numel() + 3 * next_sentence
    assert tokens == [48] * 3 + [48 if whole else read] * 3


def test_the_same_seed_makes_the_same_model():
    models = []
    for _ in range(2):
        torch.manual_seed(14)
        models.append(BertForPreTraining(TINY).state_dict())
    torch.testing.assert_close(models[0], models[1], rtol=0, atol=0)


def test_without_next_sentence_there_is_no_pooler_and_no_sentence_head():
    model = BertForPreTraining(replace(TINY, next_sentence=False))
    assert not [name for name in model.state_dict() if "pooler" in name or "seq_relationship" in name]
    inputs, masked_positions, masked_labels, next_sentence_labels = make_batch(TINY, 2, 8)
    scores, sentence_scores = model(**inputs, masked_positions=masked_positions)
    assert sentence_scores is None
    mlm_sum, _ = pretraining_loss_sums(scores, sentence_scores, masked_labels, next_sentence_labels)
    mlm_sum.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("build", [BertModel, BertForPreTraining, BertForQuestionAnswering])
def test_encoder_blocks_and_input_projections_name_modules_of_the_model(build):
    model = build(TINY)
    modules = dict(model.named_modules())
    blocks = encoder_blocks(model)
    assert [name.rpartition("encoder.layer.")[2] for name, _ in blocks] == ["0", "1"]
    assert all(modules[name] is block for name, block in blocks)
    projections = input_projections(model)
    attention = blocks[0][1].attention.self
    assert {modules[name] for name in projections} == {attention.query, attention.key, attention.value}


@pytest.mark.parametrize("size", ["large_uncased", "base_uncased", "demo"])
def test_the_configs_in_the_repository_are_read(size, pytestconfig):
    path = pytestconfig.rootpath / "config" / f"bert_{size}_config.json"
    config = BertConfig.from_json_file(path)
    assert BertConfig.from_dict(config.to_dict()) == config
    assert config.padded_vocab_size == {"demo": 2048}.get(size, 30528)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in BertForPreTraining(config).parameters())
        theirs = transformers.BertForPreTraining(hf_config(config))
    padding = (config.padded_vocab_size - config.vocab_size) * (config.hidden_size + 1)
    assert parameters - padding == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 24}, "unknown key 'hiden_size'"),
        ({"hidden_size": 25}, "hidden_size is 25: it must be a multiple of num_attention_heads, which is 3"),
        ({"hidden_act": "swish"}, "hidden_act is 'swish': it must be one of gelu, gelu_new, relu"),
        ({"tokenizer": "unigram"}, "tokenizer is 'unigram': it must be one of wordpiece, bpe"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0: it must be below 1"),
        ({"hidden_dropout_prob": float("nan")}, "hidden_dropout_prob is nan: it must be 0 or more"),
        ({"vocab_size": "61"}, "vocab_size is '61': it must be of type int"),
        ({"vocab_size": True}, "vocab_size is True: it must be of type int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0: it must be 1 or more"),
        ({"lowercase": 1}, "lowercase is 1: it must be of type bool"),
        ({"vocab_file": 3}, "vocab_file is 3: it must be of type str | None"),
    ],
)
def test_a_wrong_config_is_one_line_that_names_file_and_key(change, message, tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(TINY.to_dict() | change))
    with pytest.raises(UsageError) as error:
        BertConfig.from_json_file(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"hidden_size": 24}'])
def test_a_config_file_that_is_missing_broken_or_short_is_one_line(content, tmp_path):
    path = tmp_path / "model.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=r"model\.json: .*(cannot be read|is not JSON|one JSON object|missing)"):
        BertConfig.from_json_file(path)
