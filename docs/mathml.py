"""A hook of properdocs: `$...$` and blocks of ```math, which GitHub typesets too, become MathML in the built pages."""

from markdown import Extension
from markdown.inlinepatterns import InlineProcessor
from math_core import LatexToMathML

to_mathml = LatexToMathML().convert_with_local_state  # LaTeX that it does not know ends the build


class InlineFormula(InlineProcessor):
    def handleMatch(self, m, data):
        return self.md.htmlStash.store(to_mathml(m[1], displaystyle=False)), *m.span()


class Formulas(Extension):
    def extendMarkdown(self, md):
        pattern = InlineFormula(r"(?<!\\)\$(?!\s)([^$]+)(?<!\s)\$", md)
        md.inlinePatterns.register(pattern, "formula", 185)  # after code, before the escapes of Markdown


def display_formula(source, language, class_name, options, md, **_):
    return f'<div class="{class_name}">{to_mathml(source, displaystyle=True)}</div>'


def on_config(config):
    fence = {"name": "math", "class": "formula", "format": display_formula}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    config.markdown_extensions.append(Formulas())
