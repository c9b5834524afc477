"""The tools: they prove and never serve. No module outside this folder imports them, and no digest includes them."""
