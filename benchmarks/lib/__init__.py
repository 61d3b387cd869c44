"""What the commands are made of; nothing here imports one of them."""
