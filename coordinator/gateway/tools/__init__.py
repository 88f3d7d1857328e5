"""Tool calls in chats: how models write them, and how they are read back."""
