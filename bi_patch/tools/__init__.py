"""What proves and never serves: nothing outside this folder imports it, and it is no part of the serving digest."""
