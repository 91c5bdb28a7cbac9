"""Templates: what a prompt and a response look like, and that a chat template is kept to the letter."""

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dmpo_dist.config import TemplateConfig
from dmpo_dist.data.prompt_texts import PromptTexts, require_fields
from dmpo_dist.data.template import Template, make_template
from dmpo_dist.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# like CHATML, with a system prompt of its own
SYSTEM = "{{ '<|im_start|>system\nYou recommend.<|im_end|>\n' }}" + CHATML

titles = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
histories = st.lists(titles, max_size=4).map(tuple)


def named_tokenizer(bos=None, eos=None, chat_template=None):
    """A tokenizer of which only the names of its special tokens and the chat template matter."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token=bos, eos_token=eos)
    tokenizer.chat_template = chat_template
    return tokenizer


BASE = named_tokenizer("<s>", "</s>")


def test_the_default_prompt_reads_like_this():
    template = make_template(TemplateConfig(), BASE)
    assert template.render(("Heat", "Alien")).text == (
        "<s>A user liked these titles, oldest first:\n- Heat\n- Alien\nThe title this user will like next:\n"
    )
    assert template.render_response("Brazil") == "Brazil</s>"
    assert template.wrap("Anything at all").text == "<s>Anything at all"


def test_fields_of_items_and_users_stand_where_they_are_asked_for():
    config = TemplateConfig(
        preamble="Aged {age}:\n",
        item="{title} ({genres}){end}",
        request="For {age}: {candidates}",
        candidate="{by} {title};",
    )
    items = {"Heat": {"genres": "Crime", "by": "Mann"}, "{by}": {"genres": "Odd", "by": "{age}"}}
    template = make_template(config, BASE)
    prompt = template.render(("Heat", "{by}"), ("{by}",), items, {"age": "30"})
    assert prompt.text == "<s>Aged 30:\nHeat (Crime)</s>{by} (Odd)</s>For 30: {age} {by};"
    assert template.tail == ";"
    assert (config.item_fields, config.user_fields) == (("by", "genres"), ("age",))


def test_a_field_that_the_data_lacks_is_refused_with_those_it_has():
    items = pd.DataFrame({"item": ["1"], "title": ["Heat"], "genres": [""], "by": ["Mann"]})
    with pytest.raises(UserError, match=r"\{genres\} is no field of the items in data; known are \{by\}"):
        require_fields(TemplateConfig(item="{title} {genres}\n"), items, None, "data")
    with pytest.raises(UserError, match=r"\{age\} is no field of the users in data; known are none"):
        require_fields(TemplateConfig(preamble="{age}"), items, None, "data")
    texts = PromptTexts(item_fields=("by",)).with_items(items)
    assert texts.of_items(["Heat"]) == {"Heat": {"by": "Mann"}}
    with pytest.raises(UserError, match=r"title 'Alien': its by, which prompts show as \{by\}, is not in"):
        texts.of_items(["Alien"])
    for part, text in (("response", "{genres} {title}"), ("terminator", "{title}"), ("preamble", "{title}")):
        with pytest.raises(ValidationError, match=rf"is no placeholder of template\.{part}"):
            TemplateConfig.model_validate({part: text})


CONFIGS = [
    {},
    {"preamble": "", "item": "{title}{end}", "request": ""},
    {"item": '"{title}"{end}', "response": '{title}"', "terminator": "\n"},
    {"item": "* {title}!{end}", "response": "{title}!", "request": "-> "},
    {"item": "{title} ({title}), ", "request": "next: ", "terminator": ";"},
]


@given(histories, st.sampled_from(CONFIGS), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_prompt_is_its_parts_in_order(history, options, with_bos):
    config = TemplateConfig(**options)
    tokenizer = BASE if with_bos else named_tokenizer(None, "</s>")
    end = config.terminator.replace("{eos}", "</s>")
    template = make_template(config, tokenizer)
    items = [title.join(config.item.replace("{end}", end).split("{title}")) for title in history]
    prompt = template.render(history)
    assert prompt.text == ("<s>" if with_bos else "") + config.preamble + "".join(items) + config.request
    assert not history or prompt.text.endswith(template.tail)
    for title in history:
        assert template.render_response(title) == title.join(config.response.split("{title}")) + end
    if template.item_ends:
        assert [prompt.text[slice(*span)] for span in prompt.titles] == [template.render_response(t) for t in history]
        assert len(history) == len(prompt.titles)
    else:
        assert prompt.titles == ()


@pytest.mark.parametrize(
    ("item", "response", "ends"),
    [
        ("{title}{end}", "{title}", True),
        ("- {title}{end}", "{title}", True),
        ("{title}!{end}", "{title}!", True),
        ("{title}\n", "{title}", False),
        ("{title}{end}\n", "{title}", False),
        ("{title}{end}", "{title}!", False),
        ("{title}!{end}", "{title}", False),
        ("{title}{end}", "Title: {title}", False),
    ],
)
def test_items_end_like_a_response_or_not(item, response, ends):
    assert make_template(TemplateConfig(item=item, response=response), BASE).item_ends is ends


@pytest.mark.parametrize("title", ["{title}", "{end}", "{eos}", "{{ x }}", "a{title}b{end}"])
def test_braces_in_titles_are_only_text(title):
    template = make_template(TemplateConfig(item="<{title}>{end}"), BASE)
    assert f"<{title}></s><Heat></s>" in template.render((title, "Heat")).text
    assert template.render_response(title) == title + "</s>"


@given(histories, titles)
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("chat_template", [CHATML, SYSTEM, LLAMA2])
@pytest.mark.parametrize("chat", ["auto", "always"])
def test_a_rendered_chat_is_what_the_chat_template_makes_of_it(chat, chat_template, history, title):
    config = TemplateConfig(chat=chat)
    tokenizer = named_tokenizer("<s>", "</s>", chat_template)
    user = config.preamble + "".join(f"- {t}\n" for t in history) + config.request
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": title}]
    template = make_template(config, tokenizer)
    prompt = template.render(history).text
    assert prompt == tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert template.wrap(user).text == prompt
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    response = template.render_response(title)
    if chat_template == LLAMA2:  # its generation prompt leaves the space before the answer to the answer
        assert (prompt + response, response) == (whole, f" {title} </s>")
    else:
        assert (prompt + response + "\n", response) == (whole, title + "<|im_end|>")


def test_a_chat_template_ends_its_own_turns():
    """The terminator of the configuration is not used, nor is an end token needed; items end as the answer does."""
    config = TemplateConfig(item="{title}{end}")
    template = make_template(config, named_tokenizer(chat_template=CHATML))
    assert template.terminator == "<|im_end|>"
    assert template.item == "{title}<|im_end|>"
    assert template.tail == "<|im_end|>" + config.request + "<|im_end|>\n<|im_start|>assistant\n"


def test_chat_never_leaves_the_chat_template_aside():
    template = make_template(TemplateConfig(chat="never"), named_tokenizer("<s>", "</s>", CHATML))
    assert template == make_template(TemplateConfig(), BASE)


@pytest.mark.parametrize(
    ("options", "tokenizer", "message"),
    [
        ({}, {"bos": "<s>"}, "has no end token; .*template.terminator"),
        ({"terminator": ""}, {"eos": "</s>"}, "template.terminator is empty"),
        ({"chat": "always"}, {"eos": "</s>"}, "no chat template; set template.chat to never"),
        ({}, {"eos": "</s>", "chat_template": "{{ messages[-1]['role'] }}"}, "does not keep a message's text"),
        ({}, {"eos": "</s>", "chat_template": CHATML.replace("'<|im_end|>'", "''")}, "template.terminator is empty"),
    ],
    ids=["no end token", "no terminator", "no chat template", "text dropped", "answer without end"],
)
def test_templates_that_cannot_work_are_refused(options, tokenizer, message):
    with pytest.raises(UserError, match=message):
        make_template(TemplateConfig(**options), named_tokenizer(**tokenizer))


def test_a_template_survives_its_dict():
    template = make_template(TemplateConfig(), BASE)
    assert Template(**template.to_dict()) == template
