"""What a cache layer refuses, and why, in words."""

from __future__ import annotations

NOT_INTERCEPTED = (
    "lookm: the attention call that followed Cache.update was not intercepted, so the prompt could not be scored. The "
    "model uses an attention function of its own, or changes the keys between update and attention: not supported."
)
TWICE = (
    "lookm: a layer attended a second time in one forward (differential attention, say); scores of one of its calls "
    "would not describe what it attended to: not supported"
)
STORED_TWICE = (
    "lookm: a layer stored keys a second time in one forward (a model that loops over its layers): not supported"
)
NOT_CROPPABLE = (
    "lookm: only tokens after the compressed prompt can be cropped, it ends at position {floor} and the crop at {end}"
)
NO_ASSISTANT = (
    "lookm: assisted (speculative) decoding is not supported: its draft tokens arrive with the prompt and would be "
    "compressed with it. (A prompt read with logits_to_keep > 1 looks the same; read it with 0 or 1.)"
)
MASK_TOO_SHORT = (
    "`attention_mask` must cover the {seen} tokens read before and the {queries} new ones: [batch, {total}] or more, "
    "got {got}"
)
SHOWS_PADDING = "`attention_mask` must not show tokens that it hid when they were read: they are not in the cache"
HIDES_CHUNK = "`attention_mask` must not hide tokens that it showed in an earlier chunk of the same prompt"
HIDES_MERGED = (
    "`attention_mask` hides tokens of the compressed prompt that it showed when they were read. They were merged into "
    "pairs that stand for others too, and cannot be taken out; rule='none' (a policy without merging) can do that"
)
UNUSUAL_WINDOW = (
    "lookm: a mask that hides more of what is stored than padding is not supported with generated='window', whose "
    "compressions would not know of it"
)
NOT_A_STEP = (
    "lookm: a compiled graph attends to a cache of fixed size with a mask of its own; give a 2D mask over all tokens, "
    "or call the model uncompiled"
)
MASKED_PAST = (
    "lookm: this model's mask does not let every new token see every token before it (a mask function of its own); "
    "over a compressed cache that cannot be followed: not supported"
)
