"""Records → document store: token ids and loss masks, unpadded, in Arrow files."""
