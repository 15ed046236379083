"""One picture: bytes -> pixels (decode, by the one decoder of its format), square (fit), bytes again (encode), looks (near)."""
