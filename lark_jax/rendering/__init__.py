"""Messages -> tokens -> rows: chat templates, row lengths, batches and packing."""

# Part of the inputs of every stage that uses tokens. Raise it with any change after which the same messages, tokenizer
# and chat template may give other tokens: scores, selections, trained students and samples are then computed again.
RENDERING_VERSION = 1
