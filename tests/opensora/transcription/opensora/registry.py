"""The registry of mmengine, as far as Open-Sora uses it here."""


class Registry(dict):
    def register_module(self, name, module=None):
        if module is None:
            return lambda made: self.register_module(name, made)
        if name in self:
            raise KeyError(f"{name} is already registered")
        self[name] = module
        return module

    def build(self, cfg):
        return self[cfg["type"]](**{key: value for key, value in cfg.items() if key != "type"})


DATASETS = Registry()
