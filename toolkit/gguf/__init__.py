"""`toolkit gguf`: a language model as one GGUF file, which llama.cpp and its kin load.

`architectures` holds what is known of each network, `vocabulary` makes GGUF's tokens of a tokenizer, `writing` writes
the file and proves it; the command is in `toolkit.gguf.command`.
"""
