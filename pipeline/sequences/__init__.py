"""From documents to token ids: chats, prompts, chunking, and the mask of what is captured."""
