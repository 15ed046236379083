"""One picture: bytes to pixels by its format's one decoder (decode), square (fit), bytes again (encode), looks (near)."""
