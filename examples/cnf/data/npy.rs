//! Arrays written by NumPy: `.npy` files and `.npz` archives of them.

use super::table::Matrix;
use npyz::npz::NpzArchive;
use npyz::{Deserialize, NpyFile, NpyHeader, Order};
use std::io::{Cursor, Read, Seek};

/// Reads a `.npy` file of shape (rows, columns): floats, integers or booleans, in C or Fortran order.
///
/// # Errors
/// What is wrong with it.
pub fn read_npy(bytes: &[u8]) -> Result<Matrix, String> {
    check_header(bytes)?;
    let mut data = bytes;
    let header = NpyHeader::from_reader(&mut data).map_err(|error| error.to_string())?;
    let &[rows, columns] = header.shape() else {
        return Err(format!("the array has shape {:?}; (rows, columns) is needed", header.shape()));
    };
    let order = header.order();
    let dtype = header.dtype();
    let Some(promised) = dtype.num_bytes().and_then(|size| (size as u64).checked_mul(header.len())) else {
        return Err(format!("elements of dtype {} are not numbers", dtype.descr()));
    };
    if promised != data.len() as u64 {
        return Err(format!("the header promises {promised} bytes of data, the file holds {}", data.len()));
    }
    let values = numbers(header, data)?;
    if let Some(index) = values.iter().position(|value| !value.is_finite()) {
        let (row, column) = match order {
            Order::C => (index as u64 / columns, index as u64 % columns),
            Order::Fortran => (index as u64 % rows, index as u64 / rows),
        };
        return Err(format!("row {row}, column {column} (from 0): {}; values must be finite", values[index]));
    }
    // Both fit: the data is in memory.
    let (rows, columns) = (rows as usize, columns as usize);
    Ok(Matrix::new(
        match order {
            Order::C => values,
            Order::Fortran => {
                (0..rows).flat_map(|row| values.iter().skip(row).step_by(rows).take(columns).copied()).collect()
            }
        },
        columns,
    ))
}

/// Reads a `.npz` archive that holds one array, or one called `data`, `x` or `X` among several.
///
/// # Errors
/// What is wrong with it.
pub fn read_npz(reader: impl Read + Seek) -> Result<Matrix, String> {
    let mut archive = NpzArchive::new(reader).map_err(|error| format!("no npz archive: {error}"))?;
    let mut names: Vec<String> = archive.array_names().map(str::to_owned).collect();
    names.sort();
    let wanted = match names.as_slice() {
        [] => return Err("the archive holds no arrays".into()),
        [only] => only,
        several => several.iter().find(|name| ["data", "x", "X"].contains(&name.as_str())).ok_or_else(|| {
            format!("the archive holds several arrays ({}); call one of them `data`", names.join(", "))
        })?,
    };
    let mut bytes = Vec::new();
    let file = format!("{wanted}.npy");
    let entry = archive.zip_archive().by_name(&file);
    entry
        .map_err(|error| error.to_string())?
        .read_to_end(&mut bytes)
        .map_err(|error| format!("`{wanted}`: {error}"))?;
    read_npy(&bytes).map_err(|reason| format!("`{wanted}`: {reason}"))
}

/// The parser multiplies dimensions and allocates what the header says; so what it says is looked at first.
fn check_header(bytes: &[u8]) -> Result<(), String> {
    if !bytes.starts_with(b"\x93NUMPY") {
        return Err("no npy file: it does not begin with \\x93NUMPY".into());
    }
    let length = match bytes {
        [_, _, _, _, _, _, 1, _, a, b, ..] => usize::from(u16::from_le_bytes([*a, *b])),
        [_, _, _, _, _, _, 2 | 3, _, a, b, c, d, ..] => u32::from_le_bytes([*a, *b, *c, *d]) as usize,
        _ => return Err("the npy header is cut short or of an unknown version".into()),
    };
    let header = bytes.get(10..10 + length).ok_or("the npy header is cut short")?;
    let header = String::from_utf8_lossy(header);
    let shape = header.split_once("shape").and_then(|(_, rest)| rest.split_once('(')?.1.split_once(')'));
    let (shape, _) = shape.ok_or("the npy header has no shape")?;
    shape
        .split(',')
        .filter_map(|dim| dim.trim().parse::<u64>().ok())
        .try_fold(1u64, |product, dim| product.checked_mul(dim.max(1)))
        .filter(|&product| product < 1 << 56)
        .map(|_| ())
        .ok_or_else(|| format!("the npy header has the impossible shape ({shape})"))
}

/// The elements in the order of the file, whatever their type.
fn numbers(header: NpyHeader, data: &[u8]) -> Result<Vec<f64>, String> {
    fn as_type<T: Deserialize>(
        header: &NpyHeader,
        data: &[u8],
        widen: fn(T) -> f64,
    ) -> Option<Result<Vec<f64>, String>> {
        let reader = NpyFile::with_header(header.clone(), Cursor::new(data)).data::<T>().ok()?;
        Some(reader.map(|value| value.map(widen).map_err(|error| error.to_string())).collect())
    }
    as_type::<f64>(&header, data, |v| v)
        .or_else(|| as_type::<f32>(&header, data, f64::from))
        .or_else(|| as_type::<i64>(&header, data, |v| v as f64))
        .or_else(|| as_type::<u64>(&header, data, |v| v as f64))
        .or_else(|| as_type::<i32>(&header, data, f64::from))
        .or_else(|| as_type::<u32>(&header, data, f64::from))
        .or_else(|| as_type::<i16>(&header, data, f64::from))
        .or_else(|| as_type::<u16>(&header, data, f64::from))
        .or_else(|| as_type::<i8>(&header, data, f64::from))
        .or_else(|| as_type::<u8>(&header, data, f64::from))
        .or_else(|| as_type::<bool>(&header, data, |v| f64::from(u8::from(v))))
        .unwrap_or_else(|| {
            let dtype = header.dtype().descr();
            Err(format!("elements of dtype {dtype} cannot be read; write floats or integers, with .astype('f4') say"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `numpy.save` writes it.
    fn npy(descr: &str, order: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let mut header = format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}");
        while (10 + header.len() + 1) % 64 != 0 {
            header.push(' ');
        }
        header.push('\n');
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn both_orders_and_several_types_are_read() {
        let wanted = Matrix::new(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3);
        let c = npy("<f4", "False", "(2, 3)", &f32s(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        let fortran = npy("<f4", "True", "(2, 3)", &f32s(&[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]));
        let bytes = npy("|u1", "False", "(2, 3)", &[1, 2, 3, 4, 5, 6]);
        let wide: Vec<u8> = (1..7i64).flat_map(|value| value.to_be_bytes()).collect();
        for file in [c, fortran, bytes, npy(">i8", "False", "(2, 3)", &wide)] {
            assert_eq!(read_npy(&file), Ok(wanted.clone()));
        }
    }

    #[test]
    fn malformed_files_say_what_is_wrong() {
        let reason = |bytes: &[u8]| read_npy(bytes).unwrap_err();
        let data = f32s(&[1.0, 2.0, 3.0, 4.0]);
        assert!(reason(b"PK").contains("no npy file"));
        assert!(reason(b"\x93NUMPY\x01").contains("cut short"));
        assert!(reason(&npy("<f4", "False", "(4,)", &data)).contains("shape [4]"));
        assert!(reason(&npy("<f4", "False", "(3, 2)", &data)).contains("promises 24 bytes of data, the file holds 16"));
        assert!(reason(&npy("<f4", "False", "(1, 2)", &data)).contains("promises 8 bytes"));
        assert!(reason(&npy("<c8", "False", "(1, 2)", &data)).contains("cannot be read"));
        assert!(reason(&npy("|O", "False", "(1, 2)", &data)).contains("not numbers"));
        assert!(reason(&npy("<f4", "False", "(4294967296, 4294967296, 2)", &data)).contains("impossible shape"));
        let nan = npy("<f4", "True", "(2, 2)", &f32s(&[1.0, 2.0, f32::NAN, 4.0]));
        assert!(reason(&nan).contains("row 0, column 1 (from 0): NaN"));
        for length in 0..100 {
            assert!(read_npy(&npy("<f4", "False", "(2, 2)", &data)[..length]).is_err());
        }
        assert!(read_npz(Cursor::new(b"not an archive")).unwrap_err().contains("no npz archive"));
    }
}
