"""The environment of `configs/tools.yaml`: a calculator that a model learns to use.

An episode is worth 1 when the model asked for the sum in question; for another one, a little for each of the question's
numbers that stand in it. (To give something for any call at all teaches to copy the example, and nothing more.)
"""

import ast
import operator
import re

from stages.environments import Environment

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
ASIDE = 0.5
"""What a call is worth that has all the right numbers, and another result."""
EXAMPLE = """
Use the tool. For 1 + 2 you say:
<tool_call>
{"name": "calculate", "arguments": {"expression": "1 + 2"}}
</tool_call>
For %s you say:"""


class Calculator:
    """Computes what it is asked."""

    def reset(self, prompt: list[dict[str, str]], answer: str, **row: object) -> str:
        """Begin with a question; the example is added to it."""
        asked = prompt[-1]["content"].rpartition(":")[2].strip(" =")
        self.numbers, self.answer, self.worth = set(re.findall(r"\d+", asked)), answer, 0.0
        return EXAMPLE % asked

    def calculate(self, expression: str) -> str:
        """Compute an expression of whole numbers.

        Args:
            expression: What to compute, such as 1 + 2.
        """
        result = str(value(ast.parse(expression.strip(), mode="eval").body))
        there = self.numbers & set(re.findall(r"\d+", expression))
        self.worth = max(self.worth, 1.0 if result == self.answer else ASIDE * len(there) / len(self.numbers))
        return result

    def get_reward(self) -> float:
        """What the episode was worth."""
        return self.worth


def value(node: ast.AST) -> int:
    """Of a parsed expression. Raises ValueError for anything but sums, differences and products of whole numbers."""
    match node:
        case ast.Constant(value=int() as number):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value(operand)
        case ast.BinOp(left=left, op=how, right=right) if type(how) in OPERATORS:
            return int(OPERATORS[type(how)](value(left), value(right)))
    raise ValueError("only sums, differences and products of whole numbers can be computed")


ENVIRONMENT = Environment(1, lambda options: Calculator)
