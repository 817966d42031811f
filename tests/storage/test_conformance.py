from dagflow_storage.testing import StoreConformance


class TestEveryKindOfStore(StoreConformance):
    """Once for a folder and once for memory, through the `store` fixture."""
