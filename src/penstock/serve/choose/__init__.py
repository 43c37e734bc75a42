"""How the next tokens are chosen: options, penalties, grammars, draws."""
