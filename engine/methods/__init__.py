"""One file a method: what it scores, selects and trains. A method's name is the name of its module."""
