"""What a platform is: how it is detected, the vLLM releases that it supports, and the table of features."""
