//! Rules of the protocol that can be switched off one by one, to see that the model notices.

use std::fmt::Debug;

/// A closed list of rules; each says which invariant of docs/invariants.md it serves.
pub trait Rule: Copy + PartialEq + Debug + Send + Sync + 'static {
    const ALL: &'static [Self];

    /// What it is called on the command line and in docs/invariants.md.
    fn name(self) -> &'static str;

    /// The number in docs/invariants.md and, where one is known, the schedule in docs/schedules.md that breaks it.
    fn cites(self) -> &'static str;

    fn bit(self) -> u32;
}

/// Which rules hold.
#[derive(Debug, Clone, Copy)]
pub struct Rules<R> {
    off: u32,
    of: std::marker::PhantomData<R>,
}

impl<R: Rule> Rules<R> {
    pub fn all() -> Self {
        Self {
            off: 0,
            of: std::marker::PhantomData,
        }
    }

    pub fn without(self, rule: R) -> Self {
        Self {
            off: self.off | rule.bit(),
            ..self
        }
    }

    pub fn hold(self, rule: R) -> bool {
        self.off & rule.bit() == 0
    }
}

pub fn by_name<R: Rule>(name: &str) -> Option<R> {
    R::ALL.iter().copied().find(|rule| rule.name() == name)
}

/// Makes an enum of rules: variant, name, citation.
macro_rules! rules {
    ($(#[$attribute:meta])* $enum:ident { $($(#[$doc:meta])* $variant:ident = $name:literal, $cites:literal;)* }) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $enum {
            $($(#[$doc])* $variant,)*
        }

        impl $crate::rules::Rule for $enum {
            const ALL: &'static [Self] = &[$(Self::$variant),*];

            fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            fn cites(self) -> &'static str {
                match self {
                    $(Self::$variant => $cites,)*
                }
            }

            fn bit(self) -> u32 {
                1 << self as u32
            }
        }
    };
}
pub(crate) use rules;
