"""Reading a published Cosmos 3 folder: the transformer meta first and shard by shard, the other parts as upstream does.

No conversion: the folder is what `Cosmos3OmniPipeline.save_pretrained` writes and what is on the Hub. Only safetensors
are read, and of those only the tensors that the run uses.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, Cosmos3OmniPipeline, Cosmos3OmniTransformer, UniPCMultistepScheduler
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer

from cosmos3_train.config import Model, UserError, first_line, nearest
from cosmos3_train.model.attention import choose_backend
from cosmos3_train.model.base_identity import read_index, shard_files
from cosmos3_train.model.compiling import choose_compiler
from cosmos3_train.model.fp8 import Fp8Linear, describe_fp8, require_fp8, use_fp8
from cosmos3_train.model.omni import Cosmos3PackedTransformer, is_understanding
from cosmos3_train.model.tokenizers import place_tokenizer
from cosmos3_train.runtime import fold

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
KEPT_FLOAT32 = ("time_embedder.",)
"""Upstream keeps these in float32 whatever the rest runs in (`_keep_in_fp32_modules`)."""
LARGE = ("layers.", "embed_tokens.", "lm_head.")
"""What a checkpoint's size is made of: every other weight together is a few percent of one layer's share."""
HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)

SOUND = "sound_tokenizer"
"""Folder of the one part that not every model has."""
SWITCHES = ("default_use_system_prompt", "use_native_flow_schedule")
"""Of a folder's model_index.json: what upstream's pipeline takes from there; what is absent has upstream's default."""
RANDOM_STD = 0.02
"""Spread of weights drawn at random: what such transformers start from, so that activations keep a usual size."""


def model_folder(model: Model) -> Path:
    """The checkpoint's folder on disk, fetched from the Hub first where `path` is an id.

    Args:
        model: placed (`config.place_model`), so that a path that is not absolute is a Hub id.

    Raises:
        UserError: the repository cannot be reached, or the folder is of another kind.
    """
    folder = Path(model.path)
    if not folder.is_absolute():
        try:
            folder = Path(
                snapshot_download(model.path, revision=model.revision, ignore_patterns=["*.bin", "*.pt", "*.pth"])
            )
        except HUB_ERRORS as error:
            remedy = f"fetch it with 'hf download {model.path} --local-dir DIR' and give DIR"
            raise _hub_not_read(model, error, remedy) from error
    if not (folder / "transformer" / "config.json").is_file():
        raise UserError(
            f"model.path is {model.path!r}: no transformer/config.json in it; give a folder in the diffusers layout"
        )
    return folder


def fetched_folder(model: Model) -> Path | None:
    """As `model_folder`, but never touching the network: None for a Hub id that is not on this disk."""
    if Path(model.path).is_absolute():
        return model_folder(model)
    try:
        folder = Path(snapshot_download(model.path, revision=model.revision, local_files_only=True))
        shard_files(folder / "transformer")
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (LocalEntryNotFoundError, HFValidationError, UserError, OSError, ValueError):
        return None  # not there, or its download was cut off: fetching goes on from there
    sound, _ = index.get(SOUND, (None, None))
    parts = ("transformer", "vae", *([SOUND] if sound is not None else []))
    return folder if all((folder / part / "config.json").is_file() for part in parts) else None


def config_folder(model: Model) -> Path:
    """The checkpoint's folder where it is on this disk; else one with the transformer's config.json alone, fetched.

    Raises:
        UserError: there is neither.
    """
    folder = fetched_folder(model)
    if folder is not None:
        return folder
    try:
        return Path(hf_hub_download(model.path, "transformer/config.json", revision=model.revision)).parents[1]
    except HUB_ERRORS as error:
        remedy = (
            "the plan needs the checkpoint's transformer/config.json; parts.model=nano_random plans for Nano's sizes "
            "without"
        )
        raise _hub_not_read(model, error, remedy) from error


def _hub_not_read(model: Model, error: Exception, remedy: str) -> UserError:
    reason = first_line(error)
    return UserError(f"model.path is {model.path!r}: the Hub could not be read ({reason}); {remedy}")


Towers = Literal["both", "generation", "understanding"]


def load_backbone(
    model: Model, device: torch.device, *, text_logits: bool = True, towers: Towers = "both", large: bool = True
) -> Cosmos3PackedTransformer:
    """The packed transformer with its weights, in the run's dtype, on its device, nothing trainable yet.

    Args:
        text_logits: whether the language model's output layer is needed; without it those tensors are not read.
        towers: which are needed: the other's modules are left out, and its tensors are not read. Without the
            understanding tower `recall` must be set before a forward; without the generation tower it has `understand`
            alone.
        large: without it the `LARGE` weights stay on the meta device, for `read_weights` to read where they are wanted.

    Raises:
        UserError: a file is missing or damaged, or its tensors are not those of this architecture.
    """
    if model.base_precision == "fp8":
        require_fp8(device, DTYPES[model.dtype])
        slowly = "" if device.type == "cuda" else "; on this CPU they are multiplied in float32, which is slow"
        logger.info("frozen weights: %s%s", describe_fp8(model.fp8_copies), slowly)
    backbone = empty_backbone(model, text_logits=text_logits, towers=towers)
    config = backbone.config
    read_weights(backbone, model, device, None if large else lambda name: not name.startswith(LARGE))
    # inv_freq is a non-persistent buffer: no file holds it, and a strict load does not miss it.
    cast(Any, backbone).rotary_emb = _rotary_embedding(backbone, config).to(device)
    backbone.compute_dtype = DTYPES[model.dtype]
    backbone.attention_backend = choose_backend(model.attention, device, backbone.compute_dtype)
    backbone.compiler = choose_compiler(model.compile, device)
    again = model.checkpoint_activations
    if again in (True, "auto", "but_attention"):
        backbone.enable_gradient_checkpointing()
    backbone.keep_attention, backbone.lean = again in ("auto", "but_attention"), again == "but_products"
    return backbone


def empty_backbone(model: Model, *, text_logits: bool, towers: Towers) -> Cosmos3PackedTransformer:
    """What `load_backbone` fills, on the meta device; arguments and errors as its."""
    with init_empty_weights():
        backbone = make_backbone(model_folder(model) / "transformer", model)
    if not text_logits or towers == "generation":
        del backbone.lm_head
    if towers != "both":
        _leave_out(backbone, understanding=towers == "generation")
    return backbone


def read_weights(
    backbone: Cosmos3PackedTransformer,
    model: Model,
    device: torch.device,
    wanted: Callable[[str], bool] | None = None,
) -> None:
    """Fill the backbone's meta parameters on the device, those whose name is `wanted` or all, also around adapters.

    Raises:
        UserError: as `load_backbone`.
    """
    dtype = DTYPES[model.dtype]
    if model.random:
        fill_at_random(backbone, dtype, device, wanted, model.random_seed)
    else:
        fill_from_shards(backbone, model_folder(model) / "transformer", dtype, device, wanted)


def read_understanding(backbone: Cosmos3PackedTransformer, model: Model, device: torch.device) -> None:
    """Give a backbone without it the understanding tower, all but the language model's output layer, on the device.

    Raises:
        UserError: as `load_backbone`.
    """
    folder = model_folder(model) / "transformer"
    with init_empty_weights():
        whole = make_backbone(folder, model)
    del whole.lm_head
    for owner in _owners(whole, understanding=True):
        parent, _, leaf = owner.rpartition(".")
        setattr(backbone.get_submodule(parent), leaf, whole.get_submodule(owner))
    read_weights(backbone, model, device)


def forget_understanding(backbone: Cosmos3PackedTransformer) -> None:
    """Leave the understanding tower out of a backbone that has it."""
    _leave_out(backbone, understanding=True)


def _leave_out(backbone: Cosmos3PackedTransformer, *, understanding: bool) -> None:
    """Delete one tower's modules, or parameters where the backbone itself owns them."""
    for name in _owners(backbone, understanding=understanding):
        parent, _, leaf = name.rpartition(".")
        delattr(backbone.get_submodule(parent), leaf)


def _owners(backbone: Cosmos3PackedTransformer, *, understanding: bool) -> list[str]:
    """Names of what holds one tower's parameters: the smallest modules, or parameters of the backbone itself."""
    found = dict.fromkeys(
        name.rpartition(".")[0] or name
        for name, _ in backbone.named_parameters()
        # Edge's keys pass through it on their way to the generation tower, so whichever tower is there may need it.
        if "k_norm_und_for_gen" not in name and is_understanding(name) == understanding
    )
    return list(found)


def load_parts(model: Model, device: torch.device, *, vae_weights: bool = True) -> Cosmos3OmniPipeline:
    """Upstream's pipeline without its transformer: tokenizer, video tokenizer, scheduler, and all its builders.

    With the folder's own switches: whether plain clips have a system prompt, and at which noise levels the sampler
    steps.

    Args:
        vae_weights: without them the video tokenizer stays on the meta device: enough for prompts and canvases.
    """
    folder = model_folder(model)
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(folder / "text_tokenizer")
        scheduler: Any = UniPCMultistepScheduler.from_pretrained(folder, subfolder="scheduler")
        vae: Any
        if vae_weights:
            dtype = DTYPES[model.vae_dtype]
            vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=dtype, use_safetensors=True)
            place_tokenizer(vae, device)
        else:
            config: Any = AutoencoderKLWan.load_config(folder, subfolder="vae")
            with init_empty_weights():
                vae = AutoencoderKLWan.from_config(config)
    except (OSError, SafetensorError, json.JSONDecodeError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"{folder}: its model_index.json, tokenizer, scheduler or vae cannot be read ({reason}); fetch it again"
        ) from error
    return Cosmos3OmniPipeline(
        transformer=cast(Any, None),
        text_tokenizer=tokenizer,
        vae=vae,
        scheduler=scheduler,
        enable_safety_checker=False,
        **{switch: index[switch] for switch in SWITCHES if switch in index},
    )


def make_backbone(folder: Path, model: Model) -> Cosmos3PackedTransformer:
    """The packed transformer that `model` describes, on whatever device is the default, with no weights of its own.

    Nothing in it trains.

    Args:
        folder: the checkpoint's transformer.

    Raises:
        UserError: config.json cannot be read, a key of `model.random` is none of upstream's, or a size is none that it
            takes.
    """
    config = read_config(folder)
    if model.random:
        known = set(_sizes())
        for key in model.random:
            if key not in known:
                raise UserError(f"model.random: {key!r} is no size of the transformer.{nearest(key, known)}")
        config = dict(model.random)
    try:
        made = cast(Cosmos3PackedTransformer, Cosmos3PackedTransformer.from_config(config))
    except (TypeError, ValueError, RuntimeError) as error:
        if not model.random:
            raise
        raise UserError(f"model.random: upstream's transformer cannot be made of it ({error})") from error
    made.requires_grad_(False)
    if model.base_precision == "fp8":
        use_fp8(made.layers)
    return made


def read_config(folder: Path) -> dict[str, Any]:
    """The sizes that a transformer's config.json gives, as `Model.random` takes them.

    Raises:
        UserError: it cannot be read.
    """
    try:
        config: Any = Cosmos3PackedTransformer.load_config(folder)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{folder}/config.json cannot be read ({reason}); fetch it again") from error
    known = _sizes()
    return {key: value for key, value in config.items() if key in known}


def layer_count(sizes: Mapping[str, Any]) -> int:
    """Decoder layers of these sizes, upstream's own number where they do not say."""
    return sizes.get("num_hidden_layers", _sizes()["num_hidden_layers"].default)


def _sizes() -> Mapping[str, inspect.Parameter]:
    parameters = dict(inspect.signature(Cosmos3OmniTransformer.__init__).parameters)
    parameters.pop("self")
    return parameters


def fill_at_random(
    module: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    wanted: Callable[[str], bool] | None = None,
    seed: int = 0,
) -> None:
    """Give meta parameters of a module values on the device, one at a time: matrices normal, norms 1, biases 0.

    The same values for one seed and kind of device, whatever was drawn before and whichever parameters are left out.
    """
    generator = torch.Generator(device)
    for name, parameter in _empty_parameters(module, wanted).items():
        generator.manual_seed(fold(seed, "random weights", _published(name)))
        keep = torch.float32 if name.startswith(KEPT_FLOAT32) else dtype
        value = torch.empty(parameter.shape, dtype=keep, device=device)
        if value.dim() > 1:
            value.normal_(0, RANDOM_STD, generator=generator)
        else:
            value.fill_(0.0 if name.endswith("bias") else 1.0)
        _set_parameter(module, name, value)


def fill_from_shards(
    module: nn.Module,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    wanted: Callable[[str], bool] | None = None,
) -> None:
    """Give meta parameters of a module their tensors, one at a time, from the folder's safetensors shards.

    Raises:
        UserError: a shard is missing or damaged, a tensor is missing or has another shape; names file and tensor.
    """
    empty = _empty_parameters(module, wanted)
    names = {_published(name): name for name in empty}
    for name, tensor in _read_tensors(folder, {_published(name): value.shape for name, value in empty.items()}):
        keep = torch.float32 if name.startswith(KEPT_FLOAT32) else dtype
        _set_parameter(module, names[name], tensor.to(device=device, dtype=keep))


@contextmanager
def unrounded(backbone: Cosmos3PackedTransformer, model: Model) -> Iterator[None]:
    """Within the block, which is for a backbone on the CPU, layers in FP8 have the weights that the folder holds.

    Raises:
        UserError: as `load_backbone`.
    """
    rounded = {
        _published(f"{name}.weight"): module
        for name, module in backbone.named_modules()
        if isinstance(module, Fp8Linear)
    }
    kept = {name: module.weight for name, module in rounded.items()}
    shapes = {name: codes.shape for name, codes in kept.items()}
    try:
        for name, tensor in _read_tensors(model_folder(model) / "transformer", shapes):
            rounded[name].__class__ = cast(Any, nn.Linear)
            rounded[name].weight = nn.Parameter(tensor.to(DTYPES[model.dtype]), requires_grad=False)
        yield
    finally:
        for name, module in rounded.items():
            module.__class__ = Fp8Linear
            module.weight = kept[name]


def _read_tensors(folder: Path, wanted: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of these names and shapes, file by file."""
    places = tensor_files(folder)
    missing = sorted(wanted.keys() - places.keys())
    if missing:
        raise UserError(
            f"{folder}: the checkpoint lacks {len(missing)} tensors, {missing[0]!r} first; it is not of this "
            f"architecture, or its config.json is of another model"
        )
    by_file: dict[Path, list[str]] = {}
    for name in wanted:
        by_file.setdefault(places[name], []).append(name)
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt") as shard:
                for name in names:
                    tensor = shard.get_tensor(name)
                    if tensor.shape != wanted[name]:
                        raise UserError(
                            f"{file}: tensor {name!r} is {list(tensor.shape)}, the model expects {list(wanted[name])}"
                        )
                    yield name, tensor
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: damaged or missing ({first_line(error)}); fetch it again") from error


def _empty_parameters(module: nn.Module, wanted: Callable[[str], bool] | None) -> dict[str, nn.Parameter]:
    empty = {name: parameter for name, parameter in module.named_parameters() if parameter.is_meta}
    return {name: parameter for name, parameter in empty.items() if wanted is None or wanted(name)}


def _published(name: str) -> str:
    """The name that a parameter has without the adapter around its layer."""
    return name.replace(".base_layer.", ".")


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file of a part holds each tensor, from the index of a sharded folder or from the single file."""
    index = read_index(folder)
    if index is not None:
        return {name: folder / file for name, file in index.items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no safetensors file in it; fetch the checkpoint again")
    places: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                places.update(dict.fromkeys(shard.keys(), file))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: damaged ({first_line(error)}); fetch it again") from error
    return places


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner, trains = module.get_submodule(owner_name), module.get_parameter(name).requires_grad
    if isinstance(owner, Fp8Linear) and leaf == "weight":
        owner.set_weight(value)
    else:  # what trains is a master (`trainable`), of the value that the run's dtype has room for
        setattr(owner, leaf, nn.Parameter(value.float() if trains else value, requires_grad=trains))


def _rotary_embedding(backbone: Cosmos3PackedTransformer, config: Any) -> nn.Module:
    """Upstream's rotary embedding made anew, off the meta device, in float32."""
    made = type(backbone.rotary_emb)(
        head_dim=config.head_dim, rope_theta=config.rope_theta, rope_axes_dim=config.rope_axes_dim
    )
    return made.float()
