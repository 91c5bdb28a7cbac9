"""Chat templates of all kinds: what is trained is what the template makes of a finished conversation, or a refusal."""

import re
from datetime import date

import pytest
from test_data_template import CHATML, named_tokenizer

from dmpo_dist.config import TemplateConfig
from dmpo_dist.data.chat import render_chat
from dmpo_dist.data.template import make_template
from dmpo_dist.errors import UserError

DAY = date(2024, 7, 26)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' + m.content.lstrip('\n') }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
OPENS_A_THOUGHT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
# the thought can be switched off, under DeepSeek-V3.1's name for it
SWITCHED = OPENS_A_THOUGHT.replace(
    "'<|assistant|><think>\n'", "'<|assistant|>' + ('' if thinking is defined and not thinking else '<think>\n')"
)
GPT_OSS = (
    "{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% else %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
LLAMA2_STRIPS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA32 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n<|eot_id|>' }}"
    "{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{- m.content | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
# name -> (template, what stands before an answer, what ends it, what a response begins with)
KEPT = {
    "ignores add_generation_prompt": (
        "{% for m in messages %}<|{{m.role}}|>\n{{m.content}}<|eot|>\n{% endfor %}",
        "<|eot|>\n<|assistant|>\n", "<|eot|>", "",
    ),
    "vicuna": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content }}{% else %}"
        "{{ ' ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}", " ASSISTANT:", "</s>", " ",
    ),
    "llama 2": (LLAMA2_STRIPS, "next: [/INST]", " </s>", " "),
    "strips the user's text": (
        "{{bos_token}}{% for m in messages %}<|{{m.role}}|>{{m.content|trim}}<|eot|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}", "next:<|eot|>\n<|assistant|>", "<|eot|>", "",
    ),
    "strips on the right": (CHATML.replace("m['content']", "m['content'].rstrip()"), "assistant\n", "<|im_end|>", ""),
    "llama 3.2": (LLAMA32, "assistant<|end_header_id|>\n\n", "<|eot_id|>", ""),
    "qwen 3": (QWEN3, "<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>", ""),
    "thought switched off": (SWITCHED, "<|assistant|>", "</s>", ""),
    "gpt-oss": (GPT_OSS, "<|start|>assistant<|channel|>final<|message|>", "<|return|>", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize(
    "config", [TemplateConfig(), TemplateConfig(preamble="\n ", item="{title}; ", response='"{title}" ')]
)
def test_prompt_and_response_are_a_finished_conversation(name, config):
    chat_template, before, end, lead = KEPT[name]
    tokenizer = named_tokenizer("<s>", "</s>", chat_template)
    template = make_template(config, tokenizer)
    for history in [("Heat",), ("Alien", "Up (2009)", "Amélie")]:
        user = config.preamble + "".join(config.item.replace("{title}", title) for title in history) + config.request
        turns = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": config.response.format(title="Ran")},
        ]
        prompt, response = template.render(history).text, template.render_response("Ran")
        assert template.wrap(user).text == prompt
        assert prompt + response == render_chat(tokenizer, turns, DAY).rstrip("\n")
        assert prompt.endswith(before)
        assert prompt.endswith(template.tail)
        assert response.startswith(lead + config.response[0].replace("{", "R"))
        assert response.endswith(end)
        asked = render_chat(tokenizer, turns[:1], DAY, generation=True, options={"thinking": False})
        assert prompt.startswith(asked)


def test_history_titles_are_found_in_a_stripped_prompt():
    tokenizer = named_tokenizer("<s>", "</s>", LLAMA2_STRIPS)
    template = make_template(TemplateConfig(preamble=" \n", item="{title}{end}", request="\n"), tokenizer)
    prompt = template.render(("Heat", "Up"))
    assert [prompt.text[slice(*span)] for span in prompt.titles] == ["Heat </s>", "Up </s>"]


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        ("{% if messages[0]['role'] != 'system' %}{{ raise_exception('System message required') }}{% endif %}",
         r"cannot render .*\(System message required\); set template.chat=never"),
        ({"tool_use": "{{'x'}}", "rag": "{{'y'}}"},
         r"several chat templates \(rag, tool_use\) and no default; set template.chat=never"),
        ("{% for m in messages %}{{m.content}}", r"cannot render .*set template.chat=never"),
        ("{{ messages[0].content + 1 }}", r"cannot render .*set template.chat=never"),
        ("{{ unheard_of(messages) }}", r"cannot render .*set template.chat=never"),
        (CHATML.replace("m['content']", "m['content'] | upper"), "does not keep a message's text"),
        (CHATML.replace("m['content']", "m['content'].rstrip('\n')"), "changes a message's text.*instead of"),
        (OPENS_A_THOUGHT, r"generation prompt, .*<think>\\n', that its finished conversation, .*, does not begin with"),
        ("{{ range(100000) | random }}" + CHATML, "does not begin with|something else each time"),
    ],
    ids=["system", "named", "broken", "type error", "undefined", "upper", "strips lines only", "thought", "random"],
)  # fmt: skip
def test_a_chat_template_that_cannot_be_kept_to_is_refused_in_a_line(chat_template, message):
    with pytest.raises(UserError, match=message) as error:
        make_template(TemplateConfig(), named_tokenizer("<s>", "</s>", chat_template))
    assert "\n" not in str(error.value)


def test_a_default_among_named_templates_is_used():
    tokenizer = named_tokenizer("<s>", "</s>", {"default": CHATML, "rag": "{{'y'}}"})
    assert make_template(TemplateConfig(), tokenizer).terminator == "<|im_end|>"


@pytest.mark.parametrize(
    "chat_template", [LLAMA32, GPT_OSS, "\n{{ strftime_now('%A, %-d %B %y, %H:%M %%') }}" + CHATML]
)
def test_the_date_in_a_prompt_is_the_templates_own(chat_template, monkeypatch):
    """Whatever day it is, the prompt is the same; another ``template.date`` gives another prompt."""
    from transformers.utils import chat_template_utils

    class Later(chat_template_utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 11, 9)

    def opening(day):
        return make_template(TemplateConfig(date=day), named_tokenizer("<s>", "</s>", chat_template)).opening

    today = opening("2024-07-26")
    assert re.search(r"26 Jul 2024|2024-07-26|^\nFriday, 26 July 24, 00:00 %", today)
    assert opening("2025-01-02") != today
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert opening("2024-07-26") == today


def test_a_date_is_a_date():
    assert TemplateConfig.model_validate({"date": date(2026, 1, 31)}).date == "2026-01-31"
    with pytest.raises(ValueError, match="must be a date such as"):
        TemplateConfig(date="31 Jan 2026")


LLAMA2 = KEPT["llama 2"][0]
MISTRAL = LLAMA2.replace("' ' + m.content.strip() + ' ' + eos_token", "' ' + m.content + eos_token")


@pytest.mark.parametrize(
    ("chat_template", "row", "expected"),
    [
        (None, ("<s>[INST] liked Alien [/INST]", " Heat</s>"), "<s>[INST] liked Alien [/INST] Heat</s>"),
        (None, ("liked Alien", "Heat</s>\n"), "<s>liked AlienHeat</s>"),
        (CHATML, ("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n", "Heat"), "{}Heat<|im_end|>"),
        (CHATML, ("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nx", "Heat<|im_end|>\n"), "{}Heat<|im_end|>"),
        (LLAMA2, ("<s>[INST] x [/INST]", " Heat </s>"), "{} Heat </s>"),
        (LLAMA2, ("[INST] x [/INST]", "Heat</s>"), "<s>{} Heat </s>"),
        (LLAMA2, ("x", "Heat"), "<s>[INST] x [/INST] Heat </s>"),
        (MISTRAL, ("<s>[INST] x [/INST]", " Heat"), "{} Heat</s>"),
    ],
)
def test_a_finished_row_gets_what_it_lacks_and_nothing_twice(chat_template, row, expected):
    """Prompts that a chat template made are known by their beginning, responses that have an end by that."""
    tokenizer = named_tokenizer("<s>", "</s>", chat_template)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    template = make_template(TemplateConfig(), tokenizer)
    prompt = template.wrap(row[0])
    assert prompt.text + template.complete(row[1], prompt.templated) == expected.replace("{}", row[0])
    again = template.wrap(prompt.text)
    assert (again.text, template.complete(template.complete(row[1], prompt.templated), again.templated)) == (
        prompt.text, template.complete(row[1], prompt.templated),
    )  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_a_conversation_that_its_template_wrote_is_not_wrapped_again(name):
    tokenizer = named_tokenizer("<s>", "</s>", KEPT[name][0])
    template = make_template(TemplateConfig(), tokenizer)
    for prompt in (template.wrap("liked Alien").text, template.render(("Heat",)).text):
        assert template.wrap(prompt).text == prompt
        assert template.wrap(prompt.removeprefix("<s>")).text == prompt


def test_a_begin_token_in_the_preamble_is_not_doubled():
    template = make_template(TemplateConfig(preamble="<s>Liked:\n"), named_tokenizer("<s>", "</s>"))
    assert template.render(("Heat",)).text.count("<s>") == 1


CONVERSATION = [
    {"role": "system", "content": 'Be "brief"'},
    {"role": "user", "content": "liked Heat; next:"},
    {"role": "assistant", "content": "Alien"},
    {"role": "user", "content": "liked Alien and Amélie; next:"},
]


@pytest.mark.parametrize("turns", [CONVERSATION, CONVERSATION[1:], [CONVERSATION[0], CONVERSATION[-1]]])
@pytest.mark.parametrize("name", KEPT)
def test_a_conversation_of_several_messages_is_what_the_template_makes_of_it(name, turns):
    tokenizer = named_tokenizer("<s>", "</s>", KEPT[name][0])
    template = make_template(TemplateConfig(), tokenizer)
    prompt = template.converse(turns, tokenizer).text
    assert prompt.endswith(KEPT[name][1].removeprefix("next:"))
    for answer in ("Ran", "Up"):
        finished = render_chat(tokenizer, [*turns, {"role": "assistant", "content": answer}], DAY)
        assert prompt + template.render_response(answer) == finished.rstrip("\n")


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (
            CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
            "leaves out .* 'Be",
        ),
        (
            CHATML.replace("{% if add", "{% if messages|length > 4 %}<|more|>{% endif %}{% if add"),
            "ends a conversation of 4 messages in another way",
        ),
        (None, "has 4 messages, which only a chat template can put together"),
    ],
)
def test_a_conversation_that_cannot_be_kept_is_refused(chat_template, message):
    tokenizer = named_tokenizer("<s>", "</s>", chat_template)
    template = make_template(TemplateConfig(), tokenizer)
    with pytest.raises(UserError, match=message):
        template.converse(CONVERSATION, tokenizer)
