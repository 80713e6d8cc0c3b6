"""Train Cosmos3-Pico's tokenizer: a byte-level BPE with Qwen's special tokens and chat template.

    python experiments/pico/make_tokenizer.py --output DIR

Notable choices. The fixed pieces of upstream's action caption (JSON keys, viewpoint sentences) are added tokens,
one each: a policy's caption costs about forty tokens, not eighty, and every token is paid in each denoising step.
Numbers split into runs of up to three digits. The words come from captions and small talk about pushing a T,
built below; any other text falls back to bytes. Everything is JSON; the chat template sits in the config.
"""

import argparse
import itertools
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path

from diffusers import Cosmos3OmniPipeline
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

logger = logging.getLogger("make_tokenizer")

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CAPTION_PIECES = (
    '{"cinematography": {"framing": "',
    "This video is captured from a first-person perspective looking at the scene.",
    "This video is captured from a third-person perspective looking towards the agent from the front.",
    "This video is captured from a wrist-mounted camera.",
    "This video contains concatenated views from multiple camera perspectives.",
    '"}, "actions": [{"time": "0:00-',
    '{"actions": [{"time": "0:00-',
    '", "description": "',
    '"}], "duration": "',
    's", "fps": ',
    ', "resolution": {"H": ',
    ', "W": ',
    '}, "aspect_ratio": "',
)
VIEW_POINTS = ("ego_view", "third_person_view", "wrist_view", "concat_view", None)
CANVASES = ((256, 256), (256, 320), (320, 256), (192, 320), (320, 192), (640, 640), (480, 832), (544, 736))
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
)
CHAT_TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0) -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part -%}
{%- set seen.images = seen.images + 1 -%}
{%- if add_vision_id is defined and add_vision_id -%}{{- 'Picture ' + seen.images|string + ': ' -}}{%- endif -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' or 'video' in part -%}
{%- set seen.videos = seen.videos + 1 -%}
{%- if add_vision_id is defined and add_vision_id -%}{{- 'Video ' + seen.videos|string + ': ' -}}{%- endif -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

VERBS = (
    "push",
    "slide",
    "move",
    "turn",
    "rotate",
    "nudge",
    "bring",
    "drag",
    "shove",
    "steer",
    "press",
    "guide",
    "pull",
    "return",
    "carry",
    "lift",
)
ADJECTIVES = (
    "T-shaped",
    "gray",
    "grey",
    "blue",
    "green",
    "red",
    "round",
    "small",
    "large",
    "left",
    "right",
    "upper",
    "lower",
    "near",
    "far",
    "other",
)
NOUNS = (
    "block",
    "agent",
    "target",
    "goal",
    "table",
    "corner",
    "edge",
    "wall",
    "circle",
    "camera",
    "robot",
    "arm",
    "gripper",
    "disc",
    "piece",
    "tool",
)
RELATIONS = [
    "onto",
    "to",
    "into",
    "towards",
    "away from",
    "around",
    "along",
    "next to",
    "left of",
    "right of",
    "above",
    "below",
    "in front of",
    "behind",
    "near",
    "against",
    "over",
    "inside",
    "out of",
]
SENTENCES = (
    "Push the T-shaped block onto the T-shaped target.",
    "The agent is a blue circle and the target is a green T.",
    "A blue disc pushes a gray T-shaped block over a white table until it covers the green target.",
    "The video is {n}.{d} seconds long and is of {m} FPS. This video is of {h}x{w} resolution.",
    "The video is not {n}.{d} seconds long and is not of {m} FPS. This video is not of {h}x{w} resolution.",
    "This image is of {h}x{w} resolution. This image is not of {h}x{w} resolution.",
    "What should the agent push? It should push the block from the {side} side.",
    "Where is the block? The block is to the {side} of the target and turned by {m} degrees.",
    "How much of the target does the block cover? It covers {m} percent.",
    "Is the block on the target? Yes, it is. No, it is not; it lies {m} centimetres to the {side}.",
    "Which way must the block turn? It must turn clockwise. It must turn counter-clockwise by {m} degrees.",
    "First move around the block, then push it {side}, and stop when it does not move any more.",
    "Describe what happens in the video. The camera does not move; the agent goes {side} and touches the block.",
    "The robot moved {n} cm, waited {m} steps and reached the goal at ({m}, {h}).",
    "You are a helpful assistant who will generate images from a give prompt.",
    "You are a helpful assistant who will generate videos from a give prompt.",
    "system user assistant Picture Video question answer",
    "this that these those there their they them then than with without within from into over under between through",
    "when while where which who what why how because before after again until since during still already also only",
    "have has had been being were was are will would could should can may might must does did doing done not none",
    "one two three four five six seven eight nine ten first second third last next both each every all some many few",
    "image video frame camera view scene shows showing seen captured moving still slowly quickly smoothly straight",
    "position angle degrees centimetres pixels seconds steps distance speed direction forward backward sideways",
    "black white orange yellow purple pink brown dark light bright colour shape line square triangle letter word",
    "pick place grasp open close lift lower rotate stack pour wipe fold drawer cup bowl plate box bottle cube lid",
    "left hand right hand person people looking standing walking holding object surface floor background ground",
)
SIDES = ("left", "right", "top", "bottom", "upper left", "upper right", "lower left", "lower right")


def instructions(draw: random.Random) -> str:
    """One made-up order to a robot at a table."""
    thing, place = (f"{draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}" for _ in range(2))
    return f"{draw.choice(VERBS).capitalize()} the {thing} {draw.choice(RELATIONS)} the {place}."


def corpus(lines: int, seed: int) -> Iterator[str]:
    """Captions as upstream writes them, the orders in them, and the sentences above."""
    draw = random.Random(seed)
    sentences = itertools.cycle(SENTENCES)
    for _ in range(lines):
        height, width = draw.choice(CANVASES)
        order = draw.choice((SENTENCES[0], instructions(draw)))
        yield Cosmos3OmniPipeline._build_action_json_prompt(
            order,
            view_point=draw.choice(VIEW_POINTS),
            num_frames=1 + 4 * draw.randint(1, 40),
            fps=draw.choice((5.0, 10.0, 15.0, 20.0, 24.0, 30.0)),
            height=height,
            width=width,
        )
        yield order
        yield next(sentences).format(
            n=draw.randint(0, 30),
            d=draw.randint(0, 9),
            m=draw.randint(1, 99),
            h=height,
            w=width,
            side=draw.choice(SIDES),
        )


def train_tokenizer(vocabulary: int, lines: int, seed: int) -> PreTrainedTokenizerFast:
    """The tokenizer, special tokens first (ids 0-7), then bytes and merges, then caption pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(lines, seed), trainer)
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in CAPTION_PIECES])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def write(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save as JSON alone, under the class name that every transformers release knows."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def main() -> None:
    """Train, report the length of the PushT policy's caption, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/cosmos3_pico/text_tokenizer"))
    parser.add_argument("--vocabulary", type=int, default=1500, help="specials, bytes and merges")
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tokenizer = train_tokenizer(args.vocabulary, args.lines, args.seed)
    write(tokenizer, args.output)
    caption = Cosmos3OmniPipeline._build_action_json_prompt(
        SENTENCES[0], view_point="third_person_view", num_frames=17, fps=10.0, height=256, width=256
    )
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": caption}], add_generation_prompt=True, tokenize=False
    )
    count = {name: len(tokenizer(text).input_ids) for name, text in (("caption", caption), ("chat", str(chat)))}
    logger.info("%d tokens in the vocabulary", len(tokenizer))
    logger.info("tokens of a policy: %s", count)
    logger.info("%s", tokenizer.convert_ids_to_tokens(tokenizer(caption).input_ids))


if __name__ == "__main__":
    main()
