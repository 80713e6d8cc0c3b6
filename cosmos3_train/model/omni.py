"""Cosmos 3's Mixture-of-Transformers on two packed streams: velocities and text hidden states out.

Upstream's class is subclassed; its parameters keep their names, so a published checkpoint loads as it is. What differs
is the order of the work. Text never attends to the generation stream, so the understanding tower runs first, layer by
layer, and hands each layer's keys and values to the generation tower: without gradient and outside activation
checkpointing when nothing in it trains, and not at all when its keys and values are given or recalled from a cache,
for which its weights need not be there.

Sample borders, positions and noise levels are arguments everywhere. Nothing is kept on a module between the forward
and the backward, because activation checkpointing reads it again in backward, when it may have changed.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers import Cosmos3OmniTransformer
from diffusers.models.transformers.transformer_cosmos3 import (
    Cosmos3PackedMoTAttention,
    Cosmos3VLTextMLP,
    Cosmos3VLTextMoTDecoderLayer,
    DomainAwareLinear,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cosmos3_train.model.attention import Backend, attend
from cosmos3_train.model.compiling import Compiler, compiled
from cosmos3_train.model.context import ContextGroup, Exchange, to_heads, to_tokens
from cosmos3_train.model.keeping import keeping_attention, keeping_products
from cosmos3_train.model.projections import FusedLora, project, rejoin_shared
from cosmos3_train.types import DomainRows, PackedSequence, PictureTokens, Velocities

TIMESTEPS = 1000
"""Training timesteps: the network is told timestep = 1000·σ, which its `timestep_scale` brings back to [0, 1]."""

Rotary = tuple[Tensor, Tensor]
KeysValues = tuple[Tensor, Tensor]
"""One layer's understanding keys (rotated, as generation sees them) and values, each [U, kv heads, head_dim]."""


UNDERSTANDING_NAMES = (
    "embed_tokens.*",
    "lm_head.*",
    "norm.*",
    *(f"layers.*.self_attn.{name}.*" for name in ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k")),
    "layers.*.mlp.*",
    "layers.*.input_layernorm.*",
    "layers.*.post_attention_layernorm.*",
)
"""Parameter names (shell patterns) of the understanding tower; every other parameter is the generation tower's."""


def is_understanding(name: str) -> bool:
    """Whether a parameter of that name is the understanding tower's."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in UNDERSTANDING_NAMES)


@dataclass(frozen=True)
class Understood:
    """What the understanding tower leaves behind: keys and values of every layer, hidden states at labelled text.

    joint_order: takes the place of the pack's where prompts that are alike stand once among the keys, not once a sample
    """

    keys_values: list[KeysValues]
    text_hidden: Tensor
    joint_order: Tensor | None = None

    def copied(self) -> Understood:
        """The same in memory of its own."""
        pairs = [(keys.clone(), values.clone()) for keys, values in self.keys_values]
        order = None if self.joint_order is None else self.joint_order.clone()
        return Understood(pairs, self.text_hidden.clone(), order)


Recall = Callable[[PackedSequence], Understood]
"""Remembers what the understanding tower left behind of a pack's text; stands for a tower that is not loaded."""


@dataclass(frozen=True)
class Seen:
    """What a vision encoder makes of m text tokens' pictures. embeddings: [m, D], in place of the tokens' own;  deep:
    [m, D] each, added to the stream there after the first layer, the second, …"""

    embeddings: Tensor
    deep: tuple[Tensor, ...]


See = Callable[[PictureTokens], Seen]
"""A vision encoder. It is no part of the backbone, whose parameters are those of upstream's transformer alone."""


class _Joint(torch.autograd.Function):
    """cat(understanding, generation) rows in the joint order. Every generation row stands there once, so its gradient
    is found and not summed: with index_select's own backward that would be zeros and atomic additions."""

    @staticmethod
    def forward(ctx: Any, text: Tensor, own: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(order, places)
        ctx.text = text.shape[0]
        return torch.cat((text, own)).index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:  # pyright: ignore
        order, places = ctx.saved_tensors
        text = None
        if ctx.needs_input_grad[0]:
            rows = ctx.text + places.numel()
            text = gradient.new_zeros((rows, *gradient.shape[1:])).index_add_(0, order, gradient)[: ctx.text]
        return text, gradient.index_select(0, places), None, None


class PackedDecoderLayer(Cosmos3VLTextMoTDecoderLayer):
    """A decoder layer that runs one tower at a time. Always called through `__call__`: sharding hooks fire there."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        stream: Literal["understanding", "generation", "both"],
        hidden: Any,
        rotary: Any,
        queries: Any,
        keys: Any,
        exchange: Any,
        backend: Backend,
        compiler: Compiler | None,
        lean: bool = False,
        understood: KeysValues | None = None,
        joint: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Any, KeysValues | None]:
        """One layer of one tower: what stands before attention and after it may be compiled, attention never is.

        Args:
            stream: which tower; with "both" the five that follow are pairs, understanding first, and so is the result.
            hidden: [U, D] or [G, D].
            rotary: cosines and sines of that stream, [*, 1, head_dim].
            queries, keys: borders of the samples; for generation `keys` are those of the joint stream.
            exchange: of the stream, where this rank has a slice of it; then the keys and values that are handed on, and
                those that are taken, are this rank's heads of all tokens.
            backend, compiler: of attention, and of the rest (None runs it as it is written).
            lean: norms and gates are computed again in backward.
            understood, joint: generation only: the understanding tower's keys and values of this layer, and the order
                that puts cat(understanding, generation) keys sample by sample with the generation tokens' places in it.

        Returns:
            The stream after the layer, and for the understanding tower its keys and values for generation.
        """
        if stream == "both":
            one, other = zip(hidden, rotary, queries, keys, exchange, strict=True)
            text, understood = self.forward("understanding", *one, backend, compiler, lean)
            made, _ = self.forward("generation", *other, backend, compiler, lean, understood, joint)
            return (text, made), None
        if stream == "understanding":
            q, k, v, seen = compiled(_understanding_before, compiler)(self, hidden, rotary, lean)
            apart = () if self.self_attn.k_norm_und_for_gen is None else (seen,)  # else they are the text's own
            (q,) = to_heads(exchange, q)  # by themselves: where no text is learnt the last ones have no gradient, not 0
            k, v, *seen_apart = to_heads(exchange, k, v, *apart)
            seen = seen_apart[0] if seen_apart else k
            out = to_tokens(exchange, attend(q, k, v, queries, keys, causal=True, backend=backend))
            return compiled(_understanding_after, compiler)(self, hidden, out.flatten(-2), lean), (seen, v)
        assert understood is not None and joint is not None
        q, k, v = compiled(_generation_before, compiler)(self, hidden, rotary, lean)
        q, k, v = to_heads(exchange, q, k, v)
        k, v = (_Joint.apply(text, own, *joint) for text, own in zip(understood, (k, v), strict=True))
        out = to_tokens(exchange, attend(q, k, v, queries, keys, causal=False, backend=backend))
        return compiled(_generation_after, compiler)(self, hidden, out.flatten(-2), lean), None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedDecoderLayer:
        super()._apply(fn, recurse)
        rejoin_shared(self)
        return self


class PackedDomainLinear(DomainAwareLinear):
    """Action projection with one weight per domain: one matrix product a domain, no gather a token, no host sync."""

    def forward(self, x: Tensor, domains: DomainRows) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[rows, in] → [rows, out]; rows grouped as `domains` says. Weights are fetched through the embeddings'
        `__call__`, so trainable rows and sharding hooks take part."""
        weight = self.fc(domains.ids).to(x.dtype).unflatten(1, (self.input_size, self.output_size))
        bias = self.bias(domains.ids).to(x.dtype)
        parts = [torch.addmm(bias[place], rows, weight[place]) for place, rows in enumerate(x.split(domains.counts))]
        return torch.cat(parts) if parts else x.new_zeros((0, self.output_size))


class Cosmos3PackedTransformer(Cosmos3OmniTransformer):
    """`Cosmos3OmniTransformer` that takes a `PackedSequence`. State-dict keys equal upstream's."""

    _no_split_modules = ["PackedDecoderLayer"]  # noqa: RUF012  upstream's own form
    _repeated_blocks = ["PackedDecoderLayer"]  # noqa: RUF012

    attention_backend: Backend = "sdpa"
    compiler: Compiler | None = None
    keep_attention: bool = False
    kept_layers: int = 0
    lean: bool = False
    draws: bool = False
    understanding_trains: bool = True
    joint_layers: bool = False
    recall: Recall | None = None
    see: See | None = None
    context: ContextGroup | None = None
    _compute_dtype: torch.dtype | None = None

    @functools.wraps(Cosmos3OmniTransformer.__init__)  # upstream reads the signature to know a config's keys
    def __init__(self, *arguments, **named) -> None:
        super().__init__(*arguments, **named)
        self.use_packed_layers()

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the streams run in: that of the weights as loaded; set it before trainables become float32 masters."""
        return self._compute_dtype or self.embed_tokens.weight.dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype) -> None:
        self._compute_dtype = dtype

    @property
    def understands(self) -> bool:
        """Whether the understanding tower's weights are there."""
        return hasattr(self, "embed_tokens")

    @property
    def recomputed_layers(self) -> int:
        """How many layers compute all again in backward: with gradient checkpointing all but the last `kept_layers`.
        Of the others norms and gates are, where they are `lean`."""
        return max(0, len(self.layers) - self.kept_layers) if self.gradient_checkpointing else 0

    def use_packed_layers(self) -> None:
        """Give upstream's layers and action heads the packed forward."""
        config = cast(Any, self.config)
        self.video_width: int = config.patch_latent_dim
        self.sound_width: int = config.sound_dim or 0
        self.action_width: int = config.action_dim or 0
        self.timestep_scale: float = config.timestep_scale
        for layer in self.layers:
            layer.__class__ = PackedDecoderLayer
        if self.action_gen:
            self.action_proj_in.__class__ = PackedDomainLinear
            self.action_proj_out.__class__ = PackedDomainLinear

    def forward(self, pack: PackedSequence, understood: Understood | None = None) -> Velocities:  # pyright: ignore
        """Velocities at the generated tokens and hidden states at the labelled text tokens of a pack.

        Args:
            pack: B samples, or this rank's part of them (then all ranks of `context` call); positions and noise levels
                in float32.
            understood: what `understand` returned for these samples' text, where it is already known.

        Raises:
            AssertionError: something cast positions or noise levels below float32, which would shift every token.
        """
        if self.joint_layers and understood is None and self.recall is None and pack.generation_spans.lengths:
            return self._understand_and_generate(pack)
        understood = understood or self.understand(pack)
        video, sound, action = self.generate(pack, understood)
        return Velocities(video=video, sound=sound, action=action, text_hidden=understood.text_hidden)

    def understand(self, pack: PackedSequence) -> Understood:
        """Run the understanding tower. With nothing to train in it, no gradient and no recomputation.

        Where `recall` is set, it is asked instead.
        """
        recalled = self.recalled(pack)
        if recalled is not None:
            return recalled
        exchange, _ = self._exchanges(pack)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.understanding_trains):
            hidden, rotary, deep = self._text_in(pack)
            spans, kept = pack.text_spans, []
            for place, layer in enumerate(self.layers):
                again = self.understanding_trains and self._recomputes(place)
                hidden, keys_values = self._layer(layer, again, "understanding", hidden, rotary, spans, spans, exchange)
                hidden = _deepened(hidden, pack, deep, place)
                kept.append(keys_values)
            return Understood(keys_values=kept, text_hidden=self._text_out(hidden, pack))

    def recalled(self, pack: PackedSequence) -> Understood | None:
        """What `recall` remembers of these samples' text, None where it is not set."""
        return None if self.recall is None else self._own_heads(self.recall(pack), pack)

    def generate(self, pack: PackedSequence, understood: Understood) -> tuple[Tensor, Tensor, Tensor]:
        """Run the generation tower: velocities of video [n, P], sound [n, 64] and action [n, A] tokens."""
        if not pack.generation_spans.lengths:
            empty = understood.text_hidden.new_zeros
            return empty((0, self.video_width)), empty((0, self.sound_width)), empty((0, self.action_width))
        hidden, rotary = self._generation_in(pack)
        joint_order = pack.joint_order if understood.joint_order is None else understood.joint_order
        joint = (joint_order, pack.joint_places)
        _, exchange = self._exchanges(pack)
        for place, (layer, keys_values) in enumerate(zip(self.layers, understood.keys_values, strict=True)):
            hidden, _ = self._layer(
                layer,
                self._recomputes(place),
                "generation",
                hidden,
                rotary,
                pack.generation_spans,
                pack.joint_spans,
                exchange,
                keys_values,
                joint,
            )
        return self._generation_out(hidden, pack)

    def _understand_and_generate(self, pack: PackedSequence) -> Velocities:
        """Both towers, a layer of both at a time: where layers are sharded, so that one is gathered once a pass, not
        once a tower, and in backward not before its turn, for its keys and values do not leave it."""
        (text, text_rotary, deep), (hidden, rotary) = self._text_in(pack), self._generation_in(pack)
        queries, keys = (pack.text_spans, pack.generation_spans), (pack.text_spans, pack.joint_spans)
        joint = (pack.joint_order, pack.joint_places)
        both, rotaries, exchanges = (text, hidden), (text_rotary, rotary), self._exchanges(pack)
        for place, layer in enumerate(self.layers):
            again = self._recomputes(place)
            both, _ = self._layer(layer, again, "both", both, rotaries, queries, keys, exchanges, None, joint)
            both = (_deepened(both[0], pack, deep, place), both[1])
        video, sound, action = self._generation_out(both[1], pack)
        return Velocities(video=video, sound=sound, action=action, text_hidden=self._text_out(both[0], pack))

    def _exchanges(self, pack: PackedSequence) -> tuple[Exchange | None, Exchange | None]:
        """Of the text and of the generation stream."""
        if pack.slices is None:
            return None, None
        assert self.context is not None, "a part of a pack, and no group that has the others"
        return Exchange(self.context, pack.slices.text), Exchange(self.context, pack.slices.generation)

    def _own_heads(self, understood: Understood, pack: PackedSequence) -> Understood:
        if pack.slices is None:
            return understood
        assert self.context is not None
        own = [(self.context.own_heads(k), self.context.own_heads(v)) for k, v in understood.keys_values]
        return replace(understood, keys_values=own)

    def _text_in(self, pack: PackedSequence) -> tuple[Tensor, Rotary, tuple[Tensor, ...]]:
        """The text's first hidden states, its rotary embedding, and what pictures add to the first layers' output."""
        assert pack.text_positions.dtype == torch.float32, "text positions were cast"
        hidden, deep = self.embed_tokens(pack.text_ids).to(self.compute_dtype), ()
        if pack.pictures is not None:
            assert self.see is not None, "pictures, and no vision encoder"
            seen = self.see(pack.pictures)
            hidden = hidden.index_copy(0, pack.pictures.places, seen.embeddings.to(hidden.dtype))
            deep = tuple(part.to(hidden.dtype) for part in seen.deep)
        if self.understanding_trains:  # else nothing is kept of it for backward, also in a layer of both towers
            hidden = self._as_input(hidden)
        return hidden, self._rotary(pack.text_positions, hidden.dtype), deep

    def _text_out(self, hidden: Tensor, pack: PackedSequence) -> Tensor:
        if pack.text_out.numel():
            return self.norm(hidden).index_select(0, pack.text_out)
        return hidden.new_zeros((0, hidden.shape[1]))

    def _generation_in(self, pack: PackedSequence) -> tuple[Tensor, Rotary]:
        assert pack.positions.dtype == torch.float32, "positions were cast"
        hidden = self._as_input(self._embed_generation(pack))
        return hidden, self._rotary(pack.positions, hidden.dtype)

    def _generation_out(self, hidden: Tensor, pack: PackedSequence) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.norm_moe_gen(hidden)
        video = self.proj_out(hidden.index_select(0, pack.video_out))
        sound = hidden.new_zeros((0, self.sound_width))
        if pack.sound_out.numel():
            sound = self.audio_proj_out(hidden.index_select(0, pack.sound_out))
        action = hidden.new_zeros((0, self.action_width))
        if pack.action_out_domains.counts:
            action = self.action_proj_out(hidden.index_select(0, pack.action_out), pack.action_out_domains)
        return video, sound, action

    def _embed_generation(self, pack: PackedSequence) -> Tensor:
        """Project every modality's tokens, put them in stream order, and tell the noisy ones their σ."""
        dtype = self.compute_dtype
        parts = [self.proj_in(pack.video.to(dtype))]
        if pack.sound.shape[0]:
            parts.append(self.audio_proj_in(pack.sound.to(dtype)) + self.audio_modality_embed.to(dtype))
        if pack.action.shape[0]:
            projected = self.action_proj_in(pack.action.to(dtype), pack.action_domains)
            parts.append(projected + self.action_modality_embed.to(dtype))
        hidden = torch.cat(parts).index_select(0, pack.order)
        # One row per distinct σ of the pack instead of one per token: the embedder is float32 and D x D wide.
        assert pack.levels.dtype == torch.float32, "noise levels were cast"
        timesteps = pack.levels * TIMESTEPS * self.timestep_scale
        embedded = self.time_embedder(self.time_proj(timesteps).to(self.time_embedder.linear_1.weight.dtype))
        per_token = embedded.to(dtype).index_select(0, pack.level_index)
        return hidden + torch.where(pack.noisy[:, None], per_token, 0)

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        cos, sin = self.rotary_emb(positions[:, None], positions.device, dtype)
        return cos.reshape(-1, 1, cos.shape[-1]), sin.reshape(-1, 1, sin.shape[-1])

    def _as_input(self, hidden: Tensor) -> Tensor:
        """The first layer's input. Compiled, it asks for a gradient even where nothing before it trains: else the
        first layer alone would be compiled a second time, for an input without one."""
        if self.compiler is not None and torch.is_grad_enabled() and not hidden.requires_grad:
            hidden.requires_grad_()
        return hidden

    def _recomputes(self, place: int) -> bool:
        return torch.is_grad_enabled() and place < self.recomputed_layers

    def _layer(self, layer: nn.Module, recomputes: bool, *arguments) -> tuple[Any, KeysValues | None]:
        lean = self.lean and not recomputes and torch.is_grad_enabled()
        arguments = (*arguments[:6], self.attention_backend, self.compiler, lean, *arguments[6:])
        if not recomputes:
            return layer(*arguments)
        if self.keep_attention:
            return keeping_attention(layer, *arguments, draws=self.draws)
        return cast(Any, checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=self.draws))


def _deepened(hidden: Tensor, pack: PackedSequence, deep: tuple[Tensor, ...], place: int) -> Tensor:
    """The text after layer `place`, with what pictures add to it there."""
    if place >= len(deep):
        return hidden
    assert pack.pictures is not None
    return hidden.index_add(0, pack.pictures.places, deep[place])


def only_speaks(name: str, backbone: Cosmos3PackedTransformer) -> bool:
    """Whether a parameter of that name has a part in predicted text alone: what follows the last keys and values.

    Not the last queries' where their product is those keys' too: without text their gradient is there, and 0.
    """
    ends = ["self_attn.to_out.", "self_attn.norm_q.", "mlp.", "post_attention_layernorm."]
    if not isinstance(getattr(cast(Any, backbone.layers[-1]).self_attn, "to_q", None), FusedLora):
        ends.append("self_attn.to_q.")
    last = f"layers.{len(backbone.layers) - 1}."
    return name.startswith(("lm_head.", "norm.", *(last + end for end in ends)))


def text_logits_loss(hidden: Tensor, labels: Tensor, head: nn.Module, chunk: int) -> Tensor:
    """Summed cross-entropy of labelled tokens, `chunk` tokens' logits at a time, recomputed in backward.

    Args:
        hidden: [n, D] from `Velocities.text_hidden`;  labels: int64 [n];  head: the language model's output layer.

    Returns:
        float32 scalar, the sum (not the mean) over the n tokens.
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden.shape[0], chunk):
        part = (hidden[start : start + chunk], labels[start : start + chunk], head)
        total = total + checkpoint(_chunk_loss, *part, use_reentrant=False)  # pyright: ignore[reportOperatorIssue]
    return total


def _chunk_loss(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    return F.cross_entropy(head(hidden).float(), labels, reduction="sum")


def _heads(x: Tensor, attn: Cosmos3PackedMoTAttention) -> Tensor:
    return x.unflatten(-1, (-1, attn.head_dim))


def _rotate(x: Tensor, rotary: Rotary) -> Tensor:
    cos, sin = rotary
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


# ------------------------------------------------------------------------- a layer's work before and after attention
#
# Functions of tensors and modules alone: lengths reach them only as sizes of tensors, so that one compilation serves
# every pack and every layer.


def _understanding_before(
    layer: PackedDecoderLayer, hidden: Tensor, rotary: Rotary, lean: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values of the text, and its keys as generation will see them."""
    attn = layer.self_attn
    q, k, v = _normed(project, layer.input_layernorm, (attn.to_q, attn.to_k, attn.to_v), hidden, lean)
    q, k, v = (_heads(part, attn) for part in (q, k, v))
    q = _rotate(attn.norm_q(q), rotary)
    normed = attn.norm_k(k)
    k = _rotate(normed, rotary)
    # Edge has no text qk-norm; its keys are normalised for generation only.
    seen = k if attn.k_norm_und_for_gen is None else _rotate(attn.k_norm_und_for_gen(normed), rotary)
    return q, k, v, seen


def _understanding_after(layer: PackedDecoderLayer, hidden: Tensor, attended: Tensor, lean: bool) -> Tensor:
    hidden = hidden + layer.self_attn.to_out(attended)
    return hidden + _normed(_mlp, layer.post_attention_layernorm, layer.mlp, hidden, lean)


def _generation_before(
    layer: PackedDecoderLayer, hidden: Tensor, rotary: Rotary, lean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the generation stream."""
    attn = layer.self_attn
    projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    q, k, v = _normed(project, layer.input_layernorm_moe_gen, projections, hidden, lean)
    q, k, v = (_heads(part, attn) for part in (q, k, v))
    return _rotate(attn.norm_added_q(q), rotary), _rotate(attn.norm_added_k(k), rotary), v


def _generation_after(layer: PackedDecoderLayer, hidden: Tensor, attended: Tensor, lean: bool) -> Tensor:
    hidden = hidden + layer.self_attn.to_add_out(attended)
    return hidden + _normed(_mlp, layer.post_attention_layernorm_moe_gen, layer.mlp_moe_gen, hidden, lean)


def _normed(function: Callable[..., Any], norm: nn.Module, weights: Any, hidden: Tensor, lean: bool) -> Any:
    """`function` of weights and of the normalised stream; lean, it keeps no more than its products."""
    if lean:
        return keeping_products(lambda x: function(weights, norm(x)), hidden)
    return function(weights, norm(hidden))


def _mlp(mlp: Cosmos3VLTextMLP, x: Tensor) -> Tensor:
    """Upstream's forward, whose gate and up share their input; Edge has no gate."""
    if mlp.act_fn is None:
        return mlp(x)
    gate, up = project((mlp.gate_proj, mlp.up_proj), x)
    return mlp.down_proj(mlp.act_fn(gate) * up)
