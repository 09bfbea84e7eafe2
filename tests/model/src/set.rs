//! A set of up to eight small numbers: writes of a script, or record ids.

use std::fmt;
use std::ops::{BitAnd, BitOr, BitOrAssign, Sub, SubAssign};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Set(u8);

impl Set {
    pub const EMPTY: Set = Set(0);

    pub fn one(member: usize) -> Set {
        Set(1 << member)
    }

    /// Everything below `end`.
    pub fn below(end: usize) -> Set {
        (0..end).map(Set::one).fold(Set::EMPTY, Set::bitor)
    }

    pub fn has(self, member: usize) -> bool {
        self.0 >> member & 1 == 1
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn first(self) -> Option<usize> {
        (!self.is_empty()).then(|| self.0.trailing_zeros() as usize)
    }

    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..8).filter(move |&member| self.has(member))
    }
}

impl BitOr for Set {
    type Output = Set;

    fn bitor(self, other: Set) -> Set {
        Set(self.0 | other.0)
    }
}

impl BitAnd for Set {
    type Output = Set;

    fn bitand(self, other: Set) -> Set {
        Set(self.0 & other.0)
    }
}

impl Sub for Set {
    type Output = Set;

    fn sub(self, other: Set) -> Set {
        Set(self.0 & !other.0)
    }
}

impl BitOrAssign for Set {
    fn bitor_assign(&mut self, other: Set) {
        *self = *self | other;
    }
}

impl SubAssign for Set {
    fn sub_assign(&mut self, other: Set) {
        *self = *self - other;
    }
}

/// Counted from one, as writes are named in schedules.
impl fmt::Debug for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(|member| member + 1)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn behaves_as_a_set() {
        let set = Set::one(0) | Set::one(2);
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 2]);
        assert_eq!(set - Set::one(0), Set::one(2));
        assert_eq!(set & Set::below(2), Set::one(0));
        assert_eq!(set.first(), Some(0));
        assert_eq!(Set::EMPTY.first(), None);
        assert!(set.has(2) && !set.has(1));
        assert_eq!(format!("{set:?}"), "{1, 3}");
    }
}
