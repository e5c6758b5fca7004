"""Where things are in a checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
GOLDEN = sorted((ROOT / "tests" / "golden").glob("*.safetensors"))
CHAT_TEMPLATES = ROOT / "tests" / "eagle_core" / "chat_templates"
