"""Language models as N slots with one cache, and the heads that read them."""
