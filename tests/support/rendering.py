"""Records rendered with a tokenizer folder's template or another, and what is trained of them."""

from prep.encode.chats import ChatRenderer
from prep.encode.options import MaskPolicy
from prep.encode.records import RecordReader
from prep.encode.templates import ChatTemplate
from prep.encode.tokenizer import read_tokenizer

END = "<|im_end|>"
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)


def reader(folder, *, template=True, columns=None, allow_special=False, **policy):
    tokenizer = read_tokenizer(folder)
    mask = MaskPolicy(**policy)
    source = template if isinstance(template, str) else tokenizer.chat_template
    chats = None
    if template:
        compiled = ChatTemplate(source, tokenizer.special_tokens)
        chats = ChatRenderer(compiled, tokenizer.control_pattern, mask)
    return RecordReader(tokenizer, chats, mask, columns, allow_special)


def trained(rendering):
    return [rendering.text[start:end] for start, end in rendering.spans]


def chat(*texts, system=None):
    turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


FOUR = chat("u1", "a1", "u2", "a2", system="s")
