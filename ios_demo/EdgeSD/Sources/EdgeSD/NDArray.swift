/// An array in C order with its shape: what numpy is to the Python runtime.
public struct NDArray<Scalar> {
    public var shape: [Int]
    public var values: [Scalar]

    /// The number of values must be the product of the shape.
    public init(_ shape: [Int], _ values: [Scalar]) {
        precondition(shape.reduce(1, *) == values.count, "\(values.count) values for shape \(shape)")
        (self.shape, self.values) = (shape, values)
    }

    public var count: Int { values.count }
}

extension NDArray: Equatable where Scalar: Equatable {}
extension NDArray: Sendable where Scalar: Sendable {}

public typealias Tensor = NDArray<Float>

/// An array of one of the types that components and safetensors files hold.
public enum AnyArray: Sendable {
    case f32(NDArray<Float>), i32(NDArray<Int32>), i64(NDArray<Int64>), u8(NDArray<UInt8>)

    public var shape: [Int] {
        switch self {
        case .f32(let x): return x.shape
        case .i32(let x): return x.shape
        case .i64(let x): return x.shape
        case .u8(let x): return x.shape
        }
    }

    public var f32: NDArray<Float>? { if case .f32(let x) = self { return x } else { return nil } }
    public var i32: NDArray<Int32>? { if case .i32(let x) = self { return x } else { return nil } }
    public var i64: NDArray<Int64>? { if case .i64(let x) = self { return x } else { return nil } }
    public var u8: NDArray<UInt8>? { if case .u8(let x) = self { return x } else { return nil } }
}

extension NDArray {
    /// Rows `range` of the first axis.
    public func rows(_ range: Range<Int>) -> NDArray {
        let size = shape.dropFirst().reduce(1, *)
        return NDArray([range.count] + shape.dropFirst(), Array(values[range.lowerBound * size..<range.upperBound * size]))
    }

    /// End to end along the first axis; all other axes must be equal.
    public static func stacked(_ parts: [NDArray]) -> NDArray {
        NDArray([parts.reduce(0) { $0 + $1.shape[0] }] + parts[0].shape.dropFirst(), parts.flatMap(\.values))
    }

    /// End to end along `axis`.
    public static func joined(_ parts: [NDArray], axis: Int) -> NDArray {
        if parts.count == 1 { return parts[0] }
        let outer = parts[0].shape[..<axis].reduce(1, *)
        let sizes = parts.map { $0.shape[axis...].reduce(1, *) }
        var values: [Scalar] = []
        values.reserveCapacity(parts.reduce(0) { $0 + $1.count })
        for row in 0..<outer {
            for (part, size) in zip(parts, sizes) { values += part.values[row * size..<(row + 1) * size] }
        }
        var shape = parts[0].shape
        shape[axis] = parts.reduce(0) { $0 + $1.shape[axis] }
        return NDArray(shape, values)
    }
}

extension NDArray where Scalar == Float {
    /// a x + b y, each product and the sum rounded to float32.
    static func mix(_ a: Float, _ x: Tensor, _ b: Float, _ y: Tensor) -> Tensor {
        Tensor(x.shape, zip(x.values, y.values).map { a * $0 + b * $1 })
    }

    func scaled(_ factor: Float) -> Tensor { Tensor(shape, values.map { factor * $0 }) }

    var isFinite: Bool { values.allSatisfy(\.isFinite) }
}
