"""Messages -> tokens -> rows: chat templates, row lengths, batches and packing."""
