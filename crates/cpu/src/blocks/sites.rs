//! Where in a block's host code its guest instructions begin, packed: for each site the
//! distance from the last one, and the guest's with where the flags are.
//!
//! ```text
//!   distance on the host     guest, flags
//!   0..=254, or 255 and      bits 7:2 forwards, or all set and
//!   two bytes                two bytes from the block's start; bits 1:0 the flags
//! ```
//!
//! Called by `blocks`.

use crate::translate::lower::{Flags, Site};

/// As a distance on the host: two bytes with it follow.
const LONG: u8 = u8::MAX;
/// As a distance in the guest: two bytes with the place follow.
const AWAY: u16 = 63;

const FLAGS: [Flags; 4] = [Flags::Ax, Flags::Host, Flags::Both, Flags::Saved];

/// Packs `sites`, which are in the order of their host code, onto the end of `to`. Of those at
/// one place the last counts.
pub(super) fn pack(sites: &[Site], to: &mut Vec<u8>) {
    let (mut host, mut guest) = (0, 0);
    for (number, site) in sites.iter().enumerate() {
        if sites
            .get(number + 1)
            .is_some_and(|next| next.host == site.host)
        {
            continue;
        }
        match u8::try_from(site.host - host) {
            Ok(near) if near < LONG => to.push(near),
            _ => {
                to.push(LONG);
                to.extend_from_slice(&((site.host - host) as u16).to_le_bytes());
            }
        }
        let flags = site.flags as u8;
        match site.guest.checked_sub(guest) {
            Some(forwards) if forwards < AWAY => to.push((forwards as u8) << 2 | flags),
            _ => {
                to.push((AWAY as u8) << 2 | flags);
                to.extend_from_slice(&site.guest.to_le_bytes());
            }
        }
        (host, guest) = (site.host, site.guest);
    }
}

/// The last of the packed sites that is at `host` or before it.
pub(super) fn find(packed: &[u8], host: u32) -> Option<Site> {
    let mut bytes = packed.iter().copied();
    let mut found: Option<Site> = None;
    while let Some(distance) = bytes.next() {
        let last = found.map_or((0, 0), |site| (site.host, site.guest));
        let distance = match distance {
            LONG => word(&mut bytes)?,
            near => near.into(),
        };
        let at = last.0 + u32::from(distance);
        if at > host {
            break;
        }
        let what = bytes.next()?;
        let guest = match u16::from(what >> 2) {
            AWAY => word(&mut bytes)?,
            forwards => last.1.wrapping_add(forwards),
        };
        found = Some(Site {
            host: at,
            guest,
            flags: FLAGS[usize::from(what & 3)],
        });
    }
    found
}

fn word(bytes: &mut impl Iterator<Item = u8>) -> Option<u16> {
    Some(u16::from_le_bytes([bytes.next()?, bytes.next()?]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(host: u32, guest: u16, flags: Flags) -> Site {
        Site { host, guest, flags }
    }

    #[test]
    fn the_last_site_at_or_before_a_place_is_found() {
        let sites = [
            site(5, 0, Flags::Ax),
            site(9, 3, Flags::Host),
            site(9, 3, Flags::Saved),
            site(300, 10, Flags::Both),
            site(2000, 4, Flags::Ax),
            site(2010, 400, Flags::Host),
        ];
        let mut packed = Vec::new();
        pack(&sites, &mut packed);

        let found = |host| find(&packed, host).map(|s| (s.host, s.guest, s.flags));

        assert_eq!(found(4), None);
        assert_eq!(found(8), Some((5, 0, Flags::Ax)));
        assert_eq!(found(9), Some((9, 3, Flags::Saved)));
        assert_eq!(found(1999), Some((300, 10, Flags::Both)));
        assert_eq!(found(2000), Some((2000, 4, Flags::Ax)));
        assert_eq!(found(99_999), Some((2010, 400, Flags::Host)));
    }
}
