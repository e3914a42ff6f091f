"""Provides the base of methods that replace ``nn.Linear``; none is shipped yet, plug-ins register theirs."""
