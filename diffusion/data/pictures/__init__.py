"""One picture: bytes to pixels by the one decoder of its format (decode), square (fit), bytes again (encode), looks (near)."""
