"""What a tokenizer makes of texts and of the turns of a chat, and what it loses."""
