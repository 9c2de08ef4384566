"""Turn documents into token ids: chats, prompts, chunking, and the mask of captured tokens."""
