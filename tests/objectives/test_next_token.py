"""Cross-entropy in chunks: the value and the gradient of the whole, without the whole logits; labels one ahead."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos3_train.config import UserError
from cosmos3_train.model.omni import text_logits_loss
from cosmos3_train.model.prompts import conversation
from cosmos3_train.objectives.next_token import labelled_tokens
from cosmos3_train.types import IGNORED_LABEL, TokenSample
from tests.training.project import PICO, TALK
from tests.training.steps import parts

TOKENS, WIDTH, WORDS = 37, 16, 1152


def inputs(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((TOKENS, WIDTH), generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    head = nn.Linear(WIDTH, WORDS, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
    return hidden, labels, head.to(dtype)


@pytest.mark.parametrize("chunk", [1, 5, 37, 1000])
def test_chunks_give_the_value_and_the_gradient_of_the_whole(chunk):
    hidden, labels, head = inputs()
    whole = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    expected = torch.autograd.grad(whole, [hidden, head.weight])
    total = text_logits_loss(hidden, labels, head, chunk)
    found = torch.autograd.grad(total, [hidden, head.weight])
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) <= 1e-6


class _LargestTensor(TorchDispatchMode):
    """The most elements that any operation returned, forward and backward."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return out


def test_the_whole_logits_never_exist():
    chunk = 4
    hidden, labels, head = inputs()
    head.requires_grad_(False)
    with _LargestTensor() as seen:
        text_logits_loss(hidden, labels, head, chunk).backward()
    assert seen.largest <= max(chunk * WORDS, head.weight.numel()) < TOKENS * WORDS
    with _LargestTensor() as seen:
        text_logits_loss(hidden.detach().requires_grad_(), labels, head, TOKENS).backward()
    assert seen.largest == TOKENS * WORDS, "the measure sees whole logits where they exist"


def test_the_loss_is_float32_over_bf16_hidden_states():
    hidden, labels, head = inputs(torch.bfloat16)
    total = text_logits_loss(hidden, labels, head, 8)
    assert total.dtype == torch.float32
    expected = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)


def test_no_labelled_token_no_loss():
    _, _, head = inputs()
    assert float(text_logits_loss(torch.zeros((0, WIDTH)), torch.zeros(0, dtype=torch.long), head, 8)) == 0.0


@pytest.mark.parametrize("turns", TALK, ids=range(len(TALK)))
def test_the_assistant_s_words_and_the_end_of_its_turns_are_predicted_one_ahead(turns):
    tokenizer = parts().text_tokenizer
    messages = [{"role": role, "content": text} for role, text in turns]
    ids, labels = conversation(parts().text_tokenizer, messages, "talk/0")
    expected = "".join(f"{text}<|im_end|>" for role, text in turns if role == "assistant")
    assert tokenizer.decode(labels[labels != IGNORED_LABEL]) == expected
    places = torch.nonzero(labels != IGNORED_LABEL).flatten()
    assert torch.equal(labels[places], ids[places + 1]), "each place is told the token after it"
    first = tokenizer.decode(ids[: int(places[0]) + 1])
    assert first.endswith("<|im_start|>assistant\n")
    sample = TokenSample("talk/0", 0, "conversation", ids, labels=labels)
    assert labelled_tokens([sample, sample, TokenSample("x", 1, "policy", ids)]) == 2 * len(places)


def test_a_conversation_without_an_answer_is_refused():
    with pytest.raises(UserError, match="talk/7: no assistant turn"):
        conversation(parts().text_tokenizer, [{"role": "user", "content": "hello?"}], "talk/7")


def test_the_word_count_of_this_test_is_pico_s():
    assert json.loads((PICO / "transformer" / "config.json").read_text())["vocab_size"] == WORDS
