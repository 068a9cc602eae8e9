from rlamort.envs.sparse import SparseRecovery


class Small(SparseRecovery):
    def __init__(self):
        super().__init__(8, 12)
