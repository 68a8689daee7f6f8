"""Tools that check what runs under flash_two."""
