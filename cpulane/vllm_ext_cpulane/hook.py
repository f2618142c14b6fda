def platform_hook():
    return None
