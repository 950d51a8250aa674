from tests.helpers.threads import one_thread  # noqa: F401
