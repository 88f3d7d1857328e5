"""HTTP and text: the OpenAI API, chat templates, tokenizers and server-sent events."""
