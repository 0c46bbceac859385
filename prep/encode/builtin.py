"""Which chat template a source gets: a built-in one, a file, or the tokenizer folder's own.

The built-in ones frame plain chats as the model families do; for tools and reasoning take the family's own template.
"""

import re

import xxhash

from prep.encode.files import open_binary
from prep.encode.tokenizer import TokenizerFolder

BUILTIN = {
    "chatml": r"""{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
""",
    "llama3": r"""{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
""",
    "gemma": r"""{{- bos_token -}}
{%- set ns = namespace(prefix='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set ns.prefix = ns.prefix + message.content | trim + '\n\n' -%}
    {%- else -%}
        {%- set role = 'model' if message.role == 'assistant' else message.role -%}
        {{- '<start_of_turn>' + role + '\n' + ns.prefix + message.content | trim + '<end_of_turn>\n' -}}
        {%- set ns.prefix = '' -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\n' -}}
{%- endif -%}
""",
    "phi": r"""{%- for message in messages -%}
    {{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>\n' -}}
{%- endif -%}
""",
    "mistral": r"""{{- bos_token -}}
{%- set ns = namespace(prefix='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set ns.prefix = ns.prefix + message.content | trim + '\n\n' -%}
    {%- elif message.role == 'user' -%}
        {{- '[INST] ' + ns.prefix + message.content | trim + ' [/INST]' -}}
        {%- set ns.prefix = '' -%}
    {%- elif message.role == 'assistant' -%}
        {{- ' ' + message.content | trim + eos_token -}}
    {%- else -%}
        {{- raise_exception('the built-in mistral template knows the roles system, user and assistant') -}}
    {%- endif -%}
{%- endfor -%}
""",
    "qwen": r"""{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
""",
    "deepseek": r"""{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- message.content -}}
    {%- elif message.role == 'user' -%}
        {{- '<｜User｜>' + message.content -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<｜Assistant｜>' + message.content + '<｜end▁of▁sentence｜>' -}}
    {%- else -%}
        {{- raise_exception('the built-in deepseek template knows the roles system, user and assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<｜Assistant｜>' -}}
{%- endif -%}
""",
    "plain": r"""{%- for message in messages -%}
    {{- message.role | capitalize + ': ' + message.content -}}
    {{- (eos_token if message.role == 'assistant' else '') + '\n\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Assistant: ' -}}
{%- endif -%}
""",
}


_TOKEN = re.compile(r"<(?:[|｜][^|｜']+[|｜]|start_of_turn|end_of_turn)>")


def load_template(name: str | None, folder: TokenizerFolder | None) -> str | None:
    """The Jinja text: of a built-in template, of a file or an address; without a name the tokenizer folder's own, or
    None where it has none. Without a folder nothing is asked of the tokenizer.

    Raises:
        ValueError: neither a built-in name nor a file, or a built-in template whose tokens the tokenizer has not.
    """
    if name is None:
        return folder.chat_template
    if name in BUILTIN:
        known = _TOKEN.findall(BUILTIN[name]) if folder is None else folder.control_tokens
        missing = [token for token in _TOKEN.findall(BUILTIN[name]) if token not in known]
        if missing:
            raise ValueError(
                f"the tokenizer {folder.path.name} has no token {missing[0]}, which the built-in chat template {name} "
                "writes, so no end of a turn would be trained; take the template of the tokenizer's own family"
            )
        return BUILTIN[name]
    try:
        with open_binary(name) as file:
            return file.read().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"chat template {name}: neither a readable file nor one of {', '.join(BUILTIN)} ({error})"
        ) from None


def hash_template(text: str) -> str:
    """xxh3-128 of a template's text, hexadecimal: what says in a store which template it was encoded with."""
    return xxhash.xxh3_128(text.encode()).hexdigest()
