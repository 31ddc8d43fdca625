# ruff: noqa: N803, N806  (a tensor's name ends in its shape, in capitals)
"""BERT (Devlin et al., 2019, arXiv:1810.04805): encoder, heads and pretraining loss.

Every matrix is a plain `nn.Linear`. Module names, and so state-dict names, are Hugging Face's.

A tensor's name ends in its shape:
    B  sequences of the micro-batch     S  tokens of a sequence     P  masked positions of a sequence
    A  attention heads                  D  size of a head           H  hidden size, A * D
    V  vocabulary size, padded          C  classes                  I  intermediate size
    T  tokens of all sequences, end to end     M  predictions of all sequences, likewise

The encoder takes sequences in two forms: padded to one length, [B, S, H] with a mask, or end to end, [T, H] with a
`Packing` that says where each begins; a T in a name there stands for either form's leading dimensions.
"""

import importlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configuration import ACTIVATIONS, BertConfig
from kernels.dense_parts import bias_gelu, dropout_add_layer_norm
from kernels.embedding import lookup, rows_of
from kernels.joint import products, without_bias

# The decoder bias of a padded entry. exp(-10000) is 0 in every float format, so a padded entry has probability exactly
# 0 and gradient exactly 0: the loss is that of the unpadded vocabulary, and the entry stays as it is while training.
PADDED_BIAS = -10000.0


def _linear(config: BertConfig, in_features: int, out_features: int) -> nn.Linear:
    """Initialised as BERT is: weights from N(0, initializer_range), bias 0."""
    linear = nn.Linear(in_features, out_features)
    nn.init.normal_(linear.weight, std=config.initializer_range)
    nn.init.zeros_(linear.bias)
    return linear


def _embedding(config: BertConfig, num_embeddings: int, padding_idx: int | None = None) -> nn.Embedding:
    embedding = nn.Embedding(num_embeddings, config.hidden_size, padding_idx)
    nn.init.normal_(embedding.weight, std=config.initializer_range)
    return embedding


def _layer_norm(config: BertConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class Packing(NamedTuple):
    """Where the sequences of a micro-batch lie when no padding stands between them.

    What fills the T tokens up to a round number are sequences too, behind the B others; these may have no token.
    """

    boundaries: Tensor
    """Where each sequence begins, and where the last one ends, int32 [more than B]: 0, ..., T."""
    firsts: Tensor
    """Where each of the B sequences begins, [B]."""
    positions: Tensor
    """Place of each token within its sequence, int64 [T]."""
    longest: int
    """No sequence is longer."""
    short: bool = False
    """Whether kernels/short_attention.py runs it: on a GPU, if no sequence is longer than 512 tokens."""

    def padded(self, scores_TC: Tensor) -> Tensor:
        """[B, longest, C]: each sequence's scores, and behind its end any others."""
        place_S = torch.arange(self.longest, device=scores_TC.device)
        places_BS = (self.firsts[:, None] + place_S).clamp(max=len(scores_TC) - 1)
        return scores_TC.index_select(0, places_BS.flatten()).unflatten(0, places_BS.shape)


Attention = Packing | Tensor | None  # a mask, bool [B, 1, 1, S], goes with padded sequences; None: all of one length


def packed_attention(query_TAD: Tensor, key_TAD: Tensor, value_TAD: Tensor, packing: Packing, dropout_p: float):
    """Softmax attention of every token to those of its own sequence, [T, A, D].

    On CUDA torch's flash attention for sequences of different lengths, in bf16 or fp16; elsewhere, with a mask over
    all pairs of tokens, what it is compared with.
    """
    boundaries, longest = packing.boundaries, packing.longest
    if query_TAD.is_cuda:  # not torch.nn.attention.varlen, which has no dropout
        return torch.ops.aten._flash_attention_forward(
            *(query_TAD, key_TAD, value_TAD, boundaries, boundaries, longest, longest, dropout_p),
            is_causal=False,
            return_debug_mask=False,
        )[0]
    tokens = torch.arange(query_TAD.shape[0], dtype=boundaries.dtype, device=boundaries.device)
    sequence_T = torch.bucketize(tokens, boundaries[1:], right=True)
    inputs = (tensor.transpose(0, 1) for tensor in (query_TAD, key_TAD, value_TAD))
    return F.scaled_dot_product_attention(*inputs, sequence_T[:, None] == sequence_T, dropout_p).transpose(0, 1)


class NormOfSum(nn.LayerNorm):
    """LayerNorm of the sum of tensors."""

    def forward(self, *parts: Tensor) -> Tensor:
        return super().forward(sum(parts[1:], parts[0]))


class Embedded(NamedTuple):
    """The embeddings twice, [T, H], for the first block's product and its residual sum.

    So their gradients come apart, and the kernel of the embeddings' backward pass adds them up as it reads them.
    """

    product: Tensor
    residual: Tensor


class BertEmbeddings(nn.Module):
    """Word, position and type, added up and normalised.

    With `kernels` set, kernels/embedding_kernels.py runs it, and returns autocast's dtype, as the blocks do.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        # [PAD] starts at 0 and takes no gradient as an input, only as an output of the tied decoder.
        self.word_embeddings = _embedding(config, config.padded_vocab_size, padding_idx=0)
        with torch.no_grad():
            self.word_embeddings.weight[0].zero_()
            self.word_embeddings.weight[config.vocab_size :].zero_()
        self.position_embeddings = _embedding(config, config.max_position_embeddings)
        self.token_type_embeddings = _embedding(config, config.type_vocab_size)
        self.LayerNorm = NormOfSum(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.kernels = False

    def forward(
        self,
        input_ids_BS: Tensor,
        token_type_ids_BS: Tensor,
        positions_T: Tensor | None = None,
        twice: bool = False,
    ) -> Tensor | Embedded:
        """Without `positions_T`, each row begins at position 0. Where kernels run, they return it `twice` if asked."""
        if self.kernels:
            from kernels.embedding_kernels import embed  # imports Triton, which CPU builds of torch lack

            parts = (self.word_embeddings, self.position_embeddings, self.token_type_embeddings, self.LayerNorm)
            ids, probability = (input_ids_BS, positions_T, token_type_ids_BS), self.dropout.p if self.training else 0.0
            embedded = embed(*parts, *ids, probability, twice)
            return Embedded(*embedded) if twice else embedded
        if positions_T is None:
            positions_SH = self.position_embeddings.weight[: input_ids_BS.shape[1]]
        else:
            positions_SH = lookup(self.position_embeddings, positions_T)
        words_BSH = lookup(self.word_embeddings, input_ids_BS)
        types_BSH = lookup(self.token_type_embeddings, token_type_ids_BS)
        return self.dropout(self.LayerNorm(words_BSH, types_BSH, positions_SH))


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.query = _linear(config, config.hidden_size, config.hidden_size)
        self.key = _linear(config, config.hidden_size, config.hidden_size)
        self.value = _linear(config, config.hidden_size, config.hidden_size)
        self.num_heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob

    def projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Query, key and value, which read the same input."""
        return self.query, self.key, self.value

    def forward(self, hidden_TH: Tensor, attention: Attention) -> Tensor:
        dropout_p = self.dropout_prob if self.training else 0.0
        if isinstance(attention, Packing) and attention.short:
            from kernels.short_attention import short_attention  # imports Triton, which CPU builds of torch lack

            outputs, bias = products(hidden_TH, self.projections())
            shape = (3, self.num_heads, -1) if len(outputs) == 1 else (self.num_heads, -1)
            heads = [output.unflatten(-1, shape) for output in outputs]
            return short_attention(heads, bias, attention.boundaries, dropout_p, attention.longest).flatten(1)
        heads_TAD = [projection(hidden_TH).unflatten(-1, (self.num_heads, -1)) for projection in self.projections()]
        if isinstance(attention, Packing):
            return packed_attention(*heads_TAD, attention, dropout_p).flatten(1)
        query_BASD, key_BASD, value_BASD = (heads_BSAD.transpose(1, 2) for heads_BSAD in heads_TAD)
        context_BASD = F.scaled_dot_product_attention(query_BASD, key_BASD, value_BASD, attention, dropout_p)
        return context_BASD.transpose(1, 2).flatten(2)


class Unfinished(NamedTuple):
    """What a compiled block hands on, both [T, H]: its end, dropout and LayerNorm of the sum, is the next one's to do.

    So what the end makes for a product and for a residual sum does not leave the compiled region, and neither do their
    gradients, which the end's backward pass adds up as it reads them.
    """

    product: Tensor  # before its bias
    residual: Tensor


class BertResidualOutput(nn.Module):
    """LayerNorm(residual + dropout(dense(x))): the end of both halves of a block (post-LN).

    Added up and normalised in fp32, returned in the products' dtype: under autocast the blocks hand 16-bit numbers on,
    as NVIDIA's half-precision BERT does.
    """

    def __init__(self, config: BertConfig, in_features: int):
        super().__init__()
        self.dense = _linear(config, in_features, config.hidden_size)
        self.LayerNorm = _layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.kernels = False

    def forward(self, x: Tensor | Unfinished, residual_TH: Tensor | None = None, twice: bool = False):
        """Twice, it returns what a product and a residual sum read, as two tensors of one content.

        `Unfinished` stands for both inputs.
        """
        if isinstance(x, Unfinished):
            return self.end(x, twice)
        if torch.compiler.is_compiling():
            return self.end(Unfinished(without_bias(self.dense, x)[0], residual_TH), twice)
        y_TH = self.dense(x)
        exact = torch.promote_types(y_TH.dtype, torch.float32)
        out_TH = self.LayerNorm(self.dropout(y_TH) + residual_TH.to(exact)).to(y_TH.dtype)
        return (out_TH, out_TH) if twice else out_TH

    def end(self, unfinished: Unfinished, twice: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """What follows the product, compiled."""
        norm, probability = self.LayerNorm, self.dropout.p if self.training else 0.0
        inputs = (unfinished.product, self.dense.bias, unfinished.residual, norm.weight, norm.bias)
        return dropout_add_layer_norm(*inputs, probability, norm.eps, twice, self.kernels)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertResidualOutput(config, config.hidden_size)

    def forward(
        self, hidden_TH: Tensor, residual_TH: Tensor, attention: Attention, places_R: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        context_TH = self.self(hidden_TH, attention)
        if places_R is not None:
            context_TH, residual_TH = rows_of(context_TH, places_R), rows_of(residual_TH, places_R)
        return self.output(context_TH, residual_TH, twice=True)


class Activated(nn.Module):
    """activation(dense(x))."""

    def __init__(self, config: BertConfig, out_features: int):
        super().__init__()
        self.dense = _linear(config, config.hidden_size, out_features)
        self.activation, self.is_gelu = ACTIVATIONS[config.hidden_act], config.hidden_act == "gelu"
        self.kernels = False

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and self.is_gelu:
            return bias_gelu(*without_bias(self.dense, x), kernels=self.kernels)
        return self.activation(self.dense(x))


class BertIntermediate(Activated):
    def __init__(self, config: BertConfig):
        super().__init__(config, config.intermediate_size)


class BertLayer(nn.Module):
    """One transformer block: attention, then the feed-forward network."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertResidualOutput(config, config.intermediate_size)

    def forward(
        self,
        hidden_TH: Tensor | Embedded | Unfinished,
        attention: Attention,
        before: BertResidualOutput | None = None,
        hands_on: bool = False,
        places_R: Tensor | None = None,
    ) -> Tensor | Unfinished:
        """Return the hidden states; a compiled block that `hands_on` leaves them unfinished.

        `before` is the end of the block before, by which unfinished ones are finished. With `places_R`, places among
        all tokens, the block returns what stands there, [R, H], and computes no more behind its attention.
        """
        residual_TH = hidden_TH
        if isinstance(hidden_TH, Unfinished):
            hidden_TH, residual_TH = before.end(hidden_TH, twice=True)
        elif isinstance(hidden_TH, Embedded):
            hidden_TH, residual_TH = hidden_TH
        hidden_TH, residual_TH = self.attention(hidden_TH, residual_TH, attention, places_R)
        activated_TI = self.intermediate(hidden_TH)
        if hands_on and torch.compiler.is_compiling():
            return Unfinished(without_bias(self.output.dense, activated_TI)[0], residual_TH)
        return self.output(activated_TI, residual_TH)


class BertEncoder(nn.Module):
    """The blocks. With `checkpoint_activations` set, a block's activations are computed again in the backward pass.

    With `whole_last_block` it computes all tokens though few are read: for what prunes tokens by what others hold.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.checkpoint_activations = self.whole_last_block = False

    def forward(self, hidden_TH: Tensor | Embedded, attention: Attention, places_R: Tensor | None = None) -> Tensor:
        """Return the last block's output, with `places_R` of the tokens there alone, [R, H]."""
        if places_R is not None and self.whole_last_block:
            return rows_of(self(hidden_TH, attention), places_R)
        before = None
        for block in self.layer:
            places = {"places_R": places_R if block is self.layer[-1] else None}
            if self.checkpoint_activations:  # which keeps what a block is given: one tensor, not the two of Unfinished
                again = {"use_reentrant": False, "preserve_rng_state": True}
                hidden_TH = checkpoint(block, hidden_TH, attention, **places, **again)
            else:
                hidden_TH = block(hidden_TH, attention, before, hands_on=True, **places)
            before = block.output
        return before(hidden_TH) if isinstance(hidden_TH, Unfinished) else hidden_TH


class BertPooler(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = _linear(config, config.hidden_size, config.hidden_size)

    def forward(self, first_BH: Tensor) -> Tensor:
        """Takes the first token of each sequence."""
        return torch.tanh(self.dense(first_BH))


def first_places(ids_BS: Tensor) -> Tensor:
    """Where each of the padded sequences begins among all B S tokens, [B]."""
    return torch.arange(0, ids_BS.numel(), ids_BS.shape[1], device=ids_BS.device)


class BertModel(nn.Module):
    """Embeddings, encoder and, unless `add_pooling_layer` is False, pooler."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True):
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        attention_mask: Tensor | Packing | None,
        places_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the last block's output [B, S, H] and the pooled output [B, H] (None without a pooler).

        input_ids, token_type_ids, attention_mask: [B, S]. The mask is 1 at a real token and 0 at padding; None means
        that there is no padding. S may not exceed max_position_embeddings.
        With a `Packing` as the mask, ids and types are [T] and the last block's output is [T, H].
        With `places_R`, places among all B S or T tokens, the last block's output is that of these tokens, [R, H], and
        what else the block has behind its attention is not computed (but for the pooler's tokens).
        """
        if isinstance(attention_mask, Packing):
            firsts_B, mask, positions = attention_mask.firsts, attention_mask, attention_mask.positions
        else:
            firsts_B, positions = first_places(input_ids), None
            mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        twice = not self.encoder.checkpoint_activations  # which keeps what a block is given: one tensor
        embedded = self.embeddings(input_ids, token_type_ids, positions, twice)
        if places_R is None:
            hidden = self.encoder(embedded, mask)
            return hidden, None if self.pooler is None else self.pooler(rows_of(hidden, firsts_B))
        if self.pooler is None:
            return self.encoder(embedded, mask, places_R), None
        hidden_RH = self.encoder(embedded, mask, torch.cat([places_R, firsts_B]))
        return hidden_RH[: len(places_R)], self.pooler(hidden_RH[len(places_R) :])


class BertPredictionHeadTransform(Activated):
    def __init__(self, config: BertConfig):
        super().__init__(config, config.hidden_size)
        self.LayerNorm = _layer_norm(config)

    def forward(self, hidden_BPH: Tensor) -> Tensor:
        return self.LayerNorm(super().forward(hidden_BPH))


class BertLMPredictionHead(nn.Module):
    """The masked-token head. Its decoder's weight is the word embeddings' (tied)."""

    def __init__(self, config: BertConfig, word_embeddings: nn.Parameter):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.bias = nn.Parameter(torch.zeros(config.padded_vocab_size))
        with torch.no_grad():
            self.bias[config.vocab_size :] = PADDED_BIAS
        # On "meta", as it owns no storage: both of its tensors are held elsewhere, and so have two names each.
        self.decoder = nn.Linear(config.hidden_size, config.padded_vocab_size, device="meta")
        self.decoder.weight = word_embeddings
        self.decoder.bias = self.bias

    def forward(self, hidden_BPH: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden_BPH))


class BertPreTrainingHeads(nn.Module):
    def __init__(self, config: BertConfig, word_embeddings: nn.Parameter):
        super().__init__()
        self.predictions = BertLMPredictionHead(config, word_embeddings)
        self.seq_relationship = _linear(config, config.hidden_size, 2) if config.next_sentence else None


class BertForPreTraining(nn.Module):
    """Masked-token and, unless the config's next_sentence is False, next-sentence prediction."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.bert = BertModel(config, add_pooling_layer=config.next_sentence)
        self.cls = BertPreTrainingHeads(config, self.bert.embeddings.word_embeddings.weight)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        attention_mask: Tensor | Packing | None,
        masked_positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the token scores [B, P, V] and the next-sentence scores [B, 2] (None without that head).

        masked_positions [B, P] says which tokens to score, any unused place of it 0; None scores all, [B, S, V]. P is
        fixed, so that shapes are static. With a `Packing` these are places among all T tokens, in any shape [...], and
        the scores are [..., V]. The last block computes these tokens alone, and the first of each sequence.
        The rest is as in BertModel. Next-sentence score 0 is for the real next sentence, 1 for a random one.
        """
        if masked_positions is None:
            hidden, pooled_BH = self.bert(input_ids, token_type_ids, attention_mask)
        else:
            places = masked_positions
            if not isinstance(attention_mask, Packing):
                places = places + first_places(input_ids)[:, None]
            hidden, pooled_BH = self.bert(input_ids, token_type_ids, attention_mask, places.flatten())
            hidden = hidden.unflatten(0, places.shape)
        prediction_scores = self.cls.predictions(hidden)
        return prediction_scores, None if pooled_BH is None else self.cls.seq_relationship(pooled_BH)


def pretraining_loss_sums(
    prediction_scores: Tensor,
    seq_relationship_score: Tensor | None,
    masked_labels: Tensor,
    next_sentence_labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropies, in nats and fp32, of masked tokens and of next sentences (0 without scores).

    prediction_scores [B, P, V], seq_relationship_score [B, 2] or None, masked_labels [B, P], next_sentence_labels [B];
    where sequences lie end to end, [M, V] and [M] for the first and the third. A label of -1 is ignored. These are
    sums, for the caller to divide by the global counts of labels.
    """
    mlm_sum = _cross_entropy_sum(prediction_scores.flatten(0, -2), masked_labels.flatten())
    if seq_relationship_score is None:
        return mlm_sum, torch.zeros_like(mlm_sum)
    return mlm_sum, _cross_entropy_sum(seq_relationship_score, next_sentence_labels)


def _cross_entropy_sum(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores.float(), labels, ignore_index=-1, reduction="sum")


class BertForSequenceClassification(nn.Module):
    """num_labels classes of a sequence or a pair (GLUE); num_labels = 1 is a regression."""

    def __init__(self, config: BertConfig, num_labels: int):
        super().__init__()
        self.config = config
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = _linear(config, config.hidden_size, num_labels)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor | Packing | None) -> Tensor:
        """Return the logits [B, C]. The arguments are BertModel's."""
        _, pooled_BH = self.bert(input_ids, token_type_ids, attention_mask)
        return self.classifier(self.dropout(pooled_BH))


class BertForQuestionAnswering(nn.Module):
    """Start and end of the answer in a passage (SQuAD)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = _linear(config, config.hidden_size, 2)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor | Packing | None
    ) -> tuple[Tensor, Tensor]:
        """Return the start and the end logits, [B, S] each; what stands in the padding means nothing.

        The arguments are BertModel's; with a `Packing`, S is its longest.
        """
        hidden, _ = self.bert(input_ids, token_type_ids, attention_mask)
        scores = self.qa_outputs(hidden)
        if isinstance(attention_mask, Packing):
            scores = attention_mask.padded(scores)
        start_BS, end_BS = scores.unbind(-1)
        return start_BS, end_BS


def compiled_parts(model: nn.Module) -> list[nn.Module]:
    """What torch.compile gets, one by one: blocks of one structure share one compilation; the last one's end.

    Not the embeddings' lookups: compiled, their gradient would be added up by atomics, in no fixed order. (Where the
    embeddings have kernels, nothing calls their LayerNorm, and so nothing compiles it.)
    """
    blocks = model.bert.encoder.layer
    parts = [model.bert.embeddings.LayerNorm, *blocks, blocks[-1].output]
    return [*parts, model.cls.predictions] if hasattr(model, "cls") else parts


def use_kernels(model: nn.Module) -> None:
    """Let Triton run the embeddings, GELU, and the backward passes of the compiled blocks' dense parts, on a GPU.

    Raises:
        KernelsUnavailable: there is no Triton.
    """
    for name in ("dense_kernels", "embedding_kernels"):
        importlib.import_module(f"kernels.{name}")  # only here, as CPU builds of torch lack Triton
    for module in model.bert.modules():
        if isinstance(module, (BertEmbeddings, BertResidualOutput, BertIntermediate)):
            module.kernels = True


def encoder_blocks(model: nn.Module) -> list[tuple[str, BertLayer]]:
    """The transformer blocks of any model here, first to last, each with its full name in `model`."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BertLayer)]


def input_projections(model: nn.Module) -> set[str]:
    """Full names of the linear layers that read the embeddings: query, key and value of the first block."""
    first_block, _ = encoder_blocks(model)[0]
    return {f"{first_block}.attention.self.{projection}" for projection in ("query", "key", "value")}
